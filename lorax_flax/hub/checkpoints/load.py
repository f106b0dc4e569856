"""Checkpoints read into params trees: every key is used, every leaf filled."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lorax_flax.adapt.paths import flatten, map_with_path, path_key
from lorax_flax.errors import LoraxError, listing, nearest, unknown
from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.hub.checkpoints import quantized, shards
from lorax_flax.hub.checkpoints.entries import kind
from lorax_flax.hub.files import safetensors
from lorax_flax.hub.files.safetensors import Reader
from lorax_flax.quant import Deferred, Quantized, dense, is_quantized, name_of
from lorax_flax.quant.ggml import Ggml

_GROUP = 64 << 20  # bytes that are transferred to a device at once
_THREADS = 2  # more readers wait for one another's new pages


@dataclass(frozen=True)
class Weights:
  """The weights of a checkpoint.

  Attributes:
    params: the full tree.
    new_paths: leaves that the checkpoint does not have, freshly initialised.
    ignored_keys: stored keys of other tasks' heads and of buffers.
  """

  params: Any
  new_paths: tuple[str, ...]
  ignored_keys: tuple[str, ...]


@dataclass(frozen=True)
class Found:
  """A checkpoint whose keys are those of a key map.

  Attributes:
    reader: of its tensors.
    keymap: of the model.
    keys: stored key by bare key.
    absent: paths of the heads that it lacks.
  """

  reader: Reader
  keymap: km.KeyMap
  keys: Mapping[str, str]
  absent: frozenset[str]


def find(
  reader: Reader, keymap: km.KeyMap, untied: Mapping[str, str] | None = None
) -> Found:
  """Matches a checkpoint's keys, by its headers alone.

  Args:
    untied: bare keys that start as copies of others where the checkpoint lacks them.

  Raises:
    LoraxError: an unknown or missing key; only a head may be missing.
  """
  keymap = km.as_stored(keymap, reader)
  keys = _untied(keymap, km.bare_keys(keymap, reader), reader)
  keys = {k: keys[main] for k, main in (untied or {}).items() if main in keys} | keys
  known = {*keymap.sites, *keymap.buffers, *keymap.other_heads}
  for bare, key in keys.items():
    if bare not in known:
      raise LoraxError(unknown(f"{keymap.family} checkpoint key", key, known))
  return Found(reader, keymap, keys, frozenset(_absent(keymap, keys)))


def load(
  found: Found,
  shapes: Any,
  *,
  dtype: Any,
  std: float,
  seed: int,
  new_head: bool,
  shardings: Any = None,
  deferred: bool = False,
) -> Weights:
  """Fills a tree from a checkpoint, some tensors at a time.

  All shapes are checked before the first number is read.

  Args:
    found: of `find`.
    shapes: the tree, of ShapeDtypeStructs. A kernel that is quantised there is
      quantised as it is read; each process then reads all of it.
    dtype: of the leaves; None keeps the stored dtype of each.
    std: standard deviation of a new head's kernels; biases are zero.
    seed: a new leaf is a function of (seed, path).
    new_head: replace a head of another shape by a new one; otherwise it is an error.
    shardings: the tree, of shardings. Only the shards of this process's devices are
      read, one after another.
    deferred: leave the leaves where they are stored; each is read when it is used (see
      `quant.Deferred`).

  Raises:
    LoraxError: a key of the wrong shape, or without floating-point numbers.
  """
  leaves = flatten(shapes)
  absent = found.absent
  if new_head:
    absent |= _misfits(found, leaves)
  for bare, key in found.keys.items():
    site = found.keymap.sites.get(bare)
    if site is not None and site.path not in absent:
      _check(found, site, key, leaves[site.path].shape)

  def read(path, leaf):
    block = lambda block: _leaf(found, path, leaf.shape, dtype, block)
    if is_quantized(leaf):
      return lambda: _quantized(found, path, leaf, dtype, block)
    return lambda: block(shards.full(leaf.shape))

  def placed(path, leaf, sharding):
    if sharding is None:
      return jax.device_put(read(path, leaf)())
    if is_quantized(leaf):
      return jax.tree.map(_sharded, read(path, leaf)(), sharding)
    shard = lambda block: _leaf(found, path, leaf.shape, dtype, block)
    return shards.make_array(leaf.shape, sharding, shard)

  def fill(path, leaf, sharding=None):
    if path in absent:
      new = _fresh(path, leaf.shape, dtype or jnp.float32, std, seed)
      if sharding is None:
        return new
      return _sharded(new, sharding)
    if deferred:
      like = _like(found, path, leaf, dtype)
      return Deferred(like, functools.partial(placed, path, leaf, sharding))
    return next(full) if sharding is None else placed(path, leaf, sharding)

  present = {path: leaf for path, leaf in leaves.items() if path not in absent}
  at_once = shardings is None and not deferred
  jobs = [read(*item) for item in present.items()] if at_once else []
  full = _on_device(_ahead(jobs))
  sites = found.keymap.sites
  used = {found.keys[bare] for bare in sites if bare in found.keys}
  ignored = tuple(key for key in found.reader if key not in used)
  new = tuple(path for path in leaves if path in absent)
  rest = () if shardings is None else (shardings,)
  return Weights(map_with_path(fill, shapes, *rest), new, ignored)


def stored_as(found: Found, path: str) -> dict[str, str | None]:
  """The blocks in which each tensor of a leaf is stored, by key; None: numbers."""
  keys = [found.keys[bare] for bare in found.keymap.keys[path] if bare in found.keys]
  return {key: found.reader.blocks(key) for key in keys}


def _quantized(
  found: Found,
  path: str,
  leaf: Quantized,
  dtype: Any,
  read: Callable[[shards.Block], np.ndarray],
) -> Quantized:
  """A quantised leaf: blocks as they are stored, or else made of numbers."""
  if isinstance(leaf, Ggml) and {*stored_as(found, path).values()} == {name_of(leaf)}:
    sites = {
      found.keys[bare]: found.keymap.sites[bare] for bare in found.keymap.keys[path]
    }
    return quantized.fill_stored(leaf, found.reader, sites, dtype or leaf.dtype)
  return quantized.fill(leaf, read)


def unstacked(
  shapes: Any, stacked: km.KeyMap, keymap: km.KeyMap, *, beside: bool = False
) -> Any:
  """The tree of a model's shapes, from that of the same model with stacked layers.

  Args:
    shapes: the stacked tree, of ShapeDtypeStructs.
    stacked: the key map of the stacked tree.
    keymap: of the tree that is returned.
    beside: there are leaves that the key map lacks, and no checkpoint has.
  """
  leaves, found = flatten(shapes), {}
  others = {path: leaf for path, leaf in leaves.items() if path not in stacked.keys}
  if stacked.keys.keys() - leaves.keys() or (others and not beside):
    raise AssertionError(f"{stacked.family}: the key map's leaves are not the model's")
  for path, leaf in others.items():
    names, shape = path.split("/"), leaf.shape
    if "layers" not in names:
      found[tuple(names)] = leaf
      continue
    at = names.index("layers")
    for i in range(shape[0]):
      own = (*names[:at], f"layer_{i}", *names[at + 1 :])
      found[own] = jax.ShapeDtypeStruct(shape[1:], leaf.dtype)
  for bare, site in keymap.sites.items():
    source = stacked.sites[bare]
    leaf = leaves[source.path]
    # Axes of layers come first, and an axis of experts stays.
    shape = leaf.shape[len(source.index) - len(site.index) :]
    found[tuple(site.path.split("/"))] = jax.ShapeDtypeStruct(shape, leaf.dtype)
  return traverse_util.unflatten_dict(found)


def _ahead(jobs: Iterable[Callable[[], Any]]) -> Iterator[Any]:
  """Results in order, a few jobs at once: reading and transposing wait for memory."""
  waiting: collections.deque[futures.Future[Any]] = collections.deque()
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    for job in jobs:
      waiting.append(pool.submit(job))
      if len(waiting) > _THREADS:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _on_device(arrays: Iterable[Any]) -> Iterator[Any]:
  """The arrays on a device, many a call: a call costs as much as a small leaf."""
  group: list[Any] = []
  for array in arrays:
    group.append(array)
    if sum(each.nbytes for each in group) > _GROUP:
      yield from jax.device_put(group)
      group = []
  yield from jax.device_put(group)


def _untied(
  keymap: km.KeyMap, stored: Mapping[str, str], reader: Reader
) -> dict[str, str]:
  """`stored` without keys that repeat another's weight, or renamed to that other."""
  found = dict(stored)
  for repeat, main in keymap.ties.items():
    if repeat not in found:
      continue
    key = found.pop(repeat)
    if main not in found:
      found[main] = key
    elif not reader.same(key, found[main]):
      raise LoraxError(
        f"config.json ties {key!r} to {found[main]!r}, and the checkpoint has two "
        "different weights there"
      )
  return found


def _absent(keymap: km.KeyMap, stored: Mapping[str, str]) -> set[str]:
  """Paths of the heads of which the checkpoint has no key."""
  absent: set[str] = set()
  for paths in keymap.heads.values():
    if not any(bare in stored for p in paths for bare in keymap.keys[p]):
      absent |= set(paths)
  missing = [
    bare
    for path, keys in keymap.keys.items()
    for bare in keys
    if bare not in stored and path not in absent
  ]
  if missing:
    similar = nearest(missing[0], stored)
    hint = f"; nearest there: {', '.join(similar)}" if similar else ""
    raise LoraxError(
      f"the {keymap.family} checkpoint lacks {len(missing)} keys:"
      f" {listing(missing, 8)}{hint}"
    )
  return absent


def _misfits(found: Found, leaves: Mapping[str, Any]) -> set[str]:
  """Paths of the heads of which any tensor differs in shape from the tree."""
  keymap, wrong = found.keymap, set()
  for paths in keymap.heads.values():
    for path in paths:
      for bare in keymap.keys[path]:
        expected = _stored_shape(keymap.sites[bare], leaves[path].shape)
        if bare in found.keys and found.reader.shape(found.keys[bare]) != expected:
          wrong |= set(paths)
  return wrong


def _check(found: Found, site: km.Site, key: str, shape: Sequence[int]) -> None:
  """Checks a tensor's shape and number type, before anything is read."""
  expected, has = _stored_shape(site, shape), found.reader.shape(key)
  if has != expected:
    head = any(site.path in paths for paths in found.keymap.heads.values())
    is_lm_head = site.entry.part == "head" and not found.keymap.label_paths
    table = kind(site.entry) == "embedding" or is_lm_head
    raise LoraxError(
      f"checkpoint key {key!r} has shape {has}; {site.path!r} needs {expected} there"
      + "; new_head=True replaces a head that does not fit" * head
      + "; config.json's vocabulary may not be that of the weights" * table
    )
  dtype = found.reader.dtype(key)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise LoraxError(
      f"checkpoint key {key!r} holds {dtype}, {site.path!r} needs floating-point"
      " weights: quantised checkpoints are not read"
    )


def _stored_shape(site: km.Site, shape: Sequence[int]) -> tuple[int, ...]:
  return site.entry.form.stored_shape(site.shape(shape))


def _leaf(
  found: Found, path: str, shape: Sequence[int], dtype: Any, block: shards.Block
) -> np.ndarray:
  """A block of one leaf, assembled from its tensors."""
  sites = {bare: found.keymap.sites[bare] for bare in found.keymap.keys[path]}
  dtype = _dtype(found, path) if dtype is None else np.dtype(dtype)
  out = safetensors.empty(shards.shape_of(block), dtype)
  for bare, site in sites.items():
    overlap = shards.overlap(site, shape, block)
    if overlap is not None:
      index, part = overlap
      view = site.entry.form.to_stored(out[(*index, ...)])
      found.reader.read(found.keys[bare], part, view)
  return out


def _dtype(found: Found, path: str) -> np.dtype:
  """The dtype in which a leaf is stored."""
  dtypes = {found.reader.dtype(found.keys[bare]) for bare in found.keymap.keys[path]}
  # Stacked tensors may differ; float32 holds all supported dtypes.
  stored = next(iter(dtypes)) if len(dtypes) == 1 else jnp.float32
  return jax.dtypes.canonicalize_dtype(stored)


def _like(found: Found, path: str, leaf: Any, dtype: Any) -> Any:
  """A leaf's struct, in the dtype in which it is read."""
  dtype = jnp.dtype(_dtype(found, path) if dtype is None else dtype)
  if is_quantized(leaf):
    return replace(leaf, dtype=dtype)
  return jax.ShapeDtypeStruct(leaf.shape, dtype)


def resized(params: Any, shapes: Any, shardings: Any = None) -> Any:
  """The tree with tables of another number of tokens.

  Args:
    shapes: the tree that is returned, of ShapeDtypeStructs.
    shardings: its shardings, where it has any.
  """

  def resize(path, leaf, shape, sharding=None):
    if leaf.shape == shape.shape:
      return leaf
    with_rows = jax.jit(_with_rows, static_argnums=1, out_shardings=sharding)
    return with_rows(dense(leaf), shape.shape)

  rest = () if shardings is None else (shardings,)
  return map_with_path(resize, params, shapes, *rest)


def _with_rows(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A leaf cut to `shape`, or with means over what is too short."""
  for axis, (size, new) in enumerate(zip(leaf.shape, shape, strict=True)):
    if new > size:
      mean = leaf.mean(axis, keepdims=True, dtype=jnp.float32).astype(leaf.dtype)
      leaf = jnp.concatenate([leaf, jnp.repeat(mean, new - size, axis)], axis)
  return leaf[tuple(map(slice, shape))]


def redrawn(params: Any, stds: Mapping[str, float], *, seed: int) -> Any:
  """The tree with new leaves drawn with another seed; the others are kept.

  Args:
    stds: standard deviation of each new leaf, by path.
  """

  def draw(path, leaf):
    if path not in stds:
      return leaf
    new = _fresh(path, leaf.shape, leaf.dtype, stds[path], seed)
    return _sharded(new, leaf.sharding)

  return map_with_path(draw, params)


def extended(
  params: Any,
  shapes: Any,
  stds: Mapping[str, float],
  *,
  seed: int,
  shardings: Any = None,
) -> Any:
  """The tree with leaves that no checkpoint has, float32, drawn as `load` draws a head.

  Args:
    shapes: the tree that is returned, of ShapeDtypeStructs.
    stds: as of `redrawn`.
    shardings: its shardings, where it has any.
  """
  leaves = flatten(params)

  def fill(path, shape, sharding=None):
    if path not in stds:
      return leaves[path]
    new = _fresh(path, shape.shape, jnp.float32, stds[path], seed)
    return new if sharding is None else _sharded(new, sharding)

  rest = () if shardings is None else (shardings,)
  return map_with_path(fill, shapes, *rest)


def _sharded(leaf: Any, sharding: Any) -> jax.Array:
  cut = lambda block: np.asarray(leaf)[tuple(slice(*ends) for ends in block)]
  return shards.make_array(leaf.shape, sharding, cut)


def _fresh(path: str, shape, dtype, std: float, seed: int) -> jax.Array:
  if path.split("/")[-1] == "bias":
    return jnp.zeros(shape, dtype)
  draw = jax.random.normal(path_key(jax.random.key(seed), path), shape)
  return (std * draw).astype(dtype)
