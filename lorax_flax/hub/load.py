"""A checkpoint's tensors into a params tree: every key used, every leaf filled."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt.paths import flatten, map_with_path, path_key
from lorax_flax.errors import LoraxError, listing, nearest, unknown
from lorax_flax.hub import blocks
from lorax_flax.hub import keymap as km
from lorax_flax.hub.safetensors import Reader


@dataclass(frozen=True)
class Weights:
  """What a checkpoint gave.

  Attributes:
    params: the tree, whole.
    new_paths: leaves that the checkpoint does not have, freshly initialised.
    passed_over: stored keys of other tasks' heads and of buffers.
  """

  params: Any
  new_paths: tuple[str, ...]
  passed_over: tuple[str, ...]


def load(
  reader: Reader,
  keymap: km.KeyMap,
  shapes: Any,
  *,
  dtype: Any,
  std: float,
  seed: int,
  new_head: bool,
  shardings: Any = None,
) -> Weights:
  """Fills a tree from a checkpoint, one tensor at a time.

  Args:
    shapes: the tree, of ShapeDtypeStructs.
    dtype: that the leaves get; None leaves each the dtype that it is stored in.
    std: of the normal that the kernels of a new head are drawn from; biases are zero.
    seed: a new leaf is a function of (seed, path).
    new_head: a head of another shape is replaced by a new one, not an error.
    shardings: the tree, of shardings. Of each leaf only the parts that lie on this
      process's devices are read, one after another.

  Raises:
    LoraxError: an unknown, missing or mis-shaped key; only a head may be missing.
  """
  keymap = km.as_stored(keymap, reader)
  stored = _untied(keymap, km.bare_keys(keymap, reader), reader)
  known = {*keymap.sites, *keymap.buffers, *keymap.other_heads}
  for bare, key in stored.items():
    if bare not in known:
      raise LoraxError(unknown(f"{keymap.family} checkpoint key", key, known))
  leaves = flatten(shapes)
  absent = _absent(keymap, stored)
  if new_head:
    absent |= _misfits(keymap, leaves, stored, reader)

  def fill(path, leaf, sharding=None):
    if path in absent:
      new = _fresh(path, leaf.shape, dtype or jnp.float32, std, seed)
      if sharding is None:
        return new
      cut = lambda block: np.asarray(new)[tuple(slice(*ends) for ends in block)]
      return blocks.in_shards(leaf.shape, sharding, cut)

    def read(block):
      return _leaf(keymap, path, leaf.shape, reader, stored, block)

    if sharding is None:
      return jnp.asarray(read(blocks.whole(leaf.shape)), dtype)
    return blocks.in_shards(leaf.shape, sharding, lambda b: _cast(read(b), dtype))

  used = {stored[bare] for bare in keymap.sites if bare in stored}
  passed_over = tuple(key for key in reader if key not in used)
  new = tuple(path for path in leaves if path in absent)
  rest = () if shardings is None else (shardings,)
  return Weights(map_with_path(fill, shapes, *rest), new, passed_over)


def _untied(
  keymap: km.KeyMap, stored: Mapping[str, str], reader: Reader
) -> dict[str, str]:
  """`stored` without the keys that repeat another's weight, or in its place."""
  found = dict(stored)
  for repeat, main in keymap.ties.items():
    if repeat not in found:
      continue
    key = found.pop(repeat)
    if main not in found:
      found[main] = key
    elif not _same(reader, key, found[main]):
      raise LoraxError(
        f"config.json ties {key!r} to {found[main]!r}, and the checkpoint has two "
        "different weights there"
      )
  return found


def _same(reader: Reader, key: str, other: str, most: int = 2**24) -> bool:
  """Whether two stored tensors are equal; some rows of each are held at a time."""
  shape = reader.shape(key)
  if reader.shape(other) != shape:
    return False
  if not shape:
    return np.array_equal(reader[key], reader[other])
  rows = max(1, most // max(1, math.prod(shape[1:])))
  rest = (slice(None),) * (len(shape) - 1)
  cuts = [(slice(i, i + rows), *rest) for i in range(0, shape[0], rows)]
  return all(
    np.array_equal(reader.part(key, cut), reader.part(other, cut)) for cut in cuts
  )


def _absent(keymap: km.KeyMap, stored: Mapping[str, str]) -> set[str]:
  """Paths of heads that the checkpoint lacks as a whole."""
  absent: set[str] = set()
  for group in keymap.head_groups:
    paths = [p for p in keymap.keys if p.split("/")[0] == group]
    if not any(bare in stored for p in paths for bare in keymap.keys[p]):
      absent |= set(paths)
  missing = [
    bare
    for path, keys in keymap.keys.items()
    for bare in keys
    if bare not in stored and path not in absent
  ]
  if missing:
    near = nearest(missing[0], stored)
    hint = f"; nearest there: {', '.join(near)}" if near else ""
    raise LoraxError(
      f"the {keymap.family} checkpoint lacks {len(missing)} keys:"
      f" {listing(missing, 8)}{hint}"
    )
  return absent


def _misfits(keymap, leaves, stored, reader) -> set[str]:
  """Paths of heads of which any tensor has another shape than the tree's."""
  found: set[str] = set()
  for group in keymap.head_groups:
    paths = [p for p in keymap.keys if p.split("/")[0] == group]
    for path in paths:
      for bare in keymap.keys[path]:
        site = keymap.sites[bare]
        want = site.entry.stored_shape(site.shape(leaves[path].shape))
        if bare in stored and reader.shape(stored[bare]) != want:
          found |= set(paths)
  return found


def _leaf(
  keymap: km.KeyMap,
  path: str,
  shape,
  reader: Reader,
  stored: Mapping[str, str],
  block: blocks.Block,
) -> np.ndarray:
  """A block of one leaf, put together from its tensors; in their dtype."""
  keys = keymap.keys[path]
  found = None
  for bare in keys:
    site = keymap.sites[bare]
    places = blocks.overlap(site, shape, block)
    if places is None:
      continue
    part = _tensor(site, stored[bare], shape, reader, keymap, places[1])
    if len(keys) == 1 and not site.index:
      return part
    if found is None:
      found = np.empty(blocks.shape_of(block), part.dtype)
    found[places[0]] = part
  assert found is not None  # A leaf's tensors cover it.
  return found


def _tensor(
  site: km.Site, key: str, shape, reader: Reader, keymap: km.KeyMap, index
) -> np.ndarray:
  want, has = site.entry.stored_shape(site.shape(shape)), reader.shape(key)
  if has != want:
    head = site.path.split("/")[0] in keymap.head_groups
    raise LoraxError(
      f"checkpoint key {key!r} has shape {has}; {site.path!r} needs"
      f" {want} there" + "; new_head=True replaces a head that does not fit" * head
    )
  value = reader.part(key, index)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise LoraxError(
      f"checkpoint key {key!r} holds {value.dtype}, {site.path!r} needs floating-point"
      " weights: quantised checkpoints are not read"
    )
  return site.entry.to_ours(value)


def _cast(x: np.ndarray, dtype) -> np.ndarray:
  return x.astype(dtype or jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def _fresh(path: str, shape, dtype, std: float, seed: int) -> jax.Array:
  if path.split("/")[-1] == "bias":
    return jnp.zeros(shape, dtype)
  draw = jax.random.normal(path_key(jax.random.key(seed), path), shape)
  return (std * draw).astype(dtype)
