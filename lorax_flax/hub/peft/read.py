"""An adapter read from a PEFT folder's tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt import stacking
from lorax_flax.errors import LoraxError, listing, nearest, prefixed
from lorax_flax.hub.checkpoints.entries import Site, kind
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.forms import method_of, options_of
from lorax_flax.hub.peft.layout import Slot
from lorax_flax.hub.peft.modules import HEAD
from lorax_flax.hub.peft.tensors import Tensors
from lorax_flax.hub.peft.write import part_of
from lorax_flax.methods import Adapter, Delta, Rows, Tuned
from lorax_flax.methods.axes import by_role, resolved


@dataclass
class _Layer:
  """The leaves of a delta at one of its sites, and the slot of one of them."""

  slot: Slot
  leaves: dict[str, np.ndarray]


_Sites = dict[Site, _Layer]


def read(
  tensors: Tensors,
  slots: Mapping[str, Slot],
  config: PeftConfig,
  leaves: Mapping[str, Any],
) -> Adapter:
  """The adapter that the tensors are, float32.

  Args:
    leaves: of the base, by path.

  Raises:
    LoraxError: a missing, unknown or mis-shaped tensor; two that should be equal.
  """
  shapes = _shapes(slots, config, leaves)
  _check(tensors, slots, shapes)
  found: dict[str, _Sites] = {}
  for key, slot in slots.items():
    if slot.status == "own":
      value = slot.form.to_ours(_numbers(tensors, key, slot, leaves))
      sites = found.setdefault(slot.path, {})
      sites.setdefault(slot.site, _Layer(slot, {})).leaves[slot.leaf] = value
  shared = _shared(tensors, slots)
  adapter = {
    path: _delta(sites, leaves[path], config, shared) for path, sites in found.items()
  }
  for key, slot in slots.items():
    if slot.status in ("copy", "spare") and key in tensors.shapes:
      _check_copy(key, tensors.get(key), slot, config, adapter, leaves)
  return adapter


def _numbers(
  tensors: Tensors, key: str, slot: Slot, leaves: Mapping[str, Any]
) -> np.ndarray:
  """A tensor as float32, or as int32 where it holds places of a weight."""
  stored = tensors.get(key)
  if not slot.form.holds_places:
    return stored.astype(np.float32)
  bounds, places = _kernel(slot, leaves)[::-1], stored.astype(np.int32)
  rows, most = (places, bounds) if places.ndim > 1 else ([places], [math.prod(bounds)])
  for row, bound in zip(rows, most, strict=True):
    if not (row >= 0).all() or not (row < bound).all():
      raise LoraxError(f"{key} holds places outside of a weight of shape {bounds}")
  return places


def _shared(tensors: Tensors, slots: Mapping[str, Slot]) -> dict[str, np.ndarray]:
  """The leaves that all targets share, by name."""
  found: dict[str, np.ndarray] = {}
  for key, slot in slots.items():
    if slot.status == "shared":
      value = slot.form.to_ours(tensors.get(key).astype(np.float32))
      if not np.array_equal(found.setdefault(slot.leaf, value), value):
        raise LoraxError(f"{key} differs from another tensor, which it should repeat")
  return found


def base_tables(
  tensors: Tensors, slots: Mapping[str, Slot], leaves: Mapping[str, Any]
) -> dict[str, Any]:
  """The base's own tables that a folder holds and the base has not, by path.

  Arguments as of `read`, which refuses tables of another shape.
  """
  found = {}
  for key, slot in slots.items():
    if slot.method is None and key in tensors.shapes:
      leaf = leaves[slot.path]
      table = jnp.asarray(slot.form.to_ours(tensors.get(key)), leaf.dtype)
      if table.shape == leaf.shape and not np.array_equal(table, leaf):
        sharding = getattr(leaf, "sharding", None)  # A deferred leaf has none yet.
        found[slot.path] = jax.device_put(table, sharding)
  return found


def _shapes(
  slots: Mapping[str, Slot], config: PeftConfig, leaves: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
  """The shape of each key's tensor, by the base's leaves and the config's ranks."""
  shapes = {}
  factored = [
    slot
    for slot in slots.values()
    if slot.status == "own" and slot.method not in (None, Rows, Tuned)
  ]
  for key, slot in slots.items():
    if slot.status == "echo":
      continue
    if slot.status == "shared":
      each = [_kernel(s, leaves) for s in factored]
      widest = tuple(max(sizes) for sizes in zip(*each, strict=True))
      shapes[key] = slot.form.stored_shape(_leaf_shape(slot, config, widest, slot.leaf))
      continue
    inner = _kernel(slot, leaves)
    shape = tuple(leaves[slot.path].shape)
    if slot.method in (None, Tuned):
      ours = slot.site.shape(shape)
    elif slot.method is Rows:
      axis = _axis(slot)
      if max(slot.rows) >= inner[axis]:
        raise LoraxError(
          f"{peft_config.CONFIG_FILE}: trainable_token_indices go up to "
          f"{max(slot.rows)}, and {slot.module} has {inner[axis]} rows: where the "
          "vocabulary was resized, load the base with its vocab_size"
        )
      ours = (len(slot.rows), inner[1 - axis])
    else:
      ours = _leaf_shape(slot, config, inner, slot.leaf)
    shapes[key] = slot.form.stored_shape(ours)
  return shapes


def _kernel(slot: Slot, leaves: Mapping[str, Any]) -> tuple[int, ...]:
  """The shape of the base's leaf at one site."""
  if slot.path not in leaves:
    raise LoraxError(f"the base has no {slot.path}, which {slot.module} is")
  return tuple(leaves[slot.path].shape)[len(slot.site.index) :]


def _leaf_shape(
  slot: Slot, config: PeftConfig, kernel: tuple[int, ...], name: str
) -> tuple[int, ...]:
  """The shape of a leaf of the delta of a kernel of this shape."""
  method = method_of(config)
  sizes = {"rank": config.rank(slot.module), **options_of(config, slot.module)}
  with prefixed(slot.module):
    return method.leaf_shape(name, kernel, slot.roles, sizes)


def _axis(slot: Slot) -> int:
  """The axis of a slot's rows: 0 of an embedding, 1 of a head."""
  return 0 if slot.path.endswith("embedding") else 1


def _check(
  tensors: Tensors, slots: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]]
) -> None:
  found = tensors.shapes
  own = [key for key, slot in slots.items() if slot.status in ("own", "shared")]
  if missing := sorted(set(own) - found.keys()):
    near = nearest(missing[0], found)
    raise LoraxError(
      f"{len(missing)} missing tensors in {tensors.name}: {listing(missing, most=4)}; "
      f"nearest to the first: {listing(near) or 'none'}"
    )
  extra = sorted(key for key in found if key not in slots and not _is_idle(key))
  if extra:
    near = nearest(extra[0], shapes)
    raise LoraxError(
      f"{len(extra)} tensors in {tensors.name} that {peft_config.CONFIG_FILE} does not "
      f"speak of: {listing(extra, most=4)}; nearest to the first: "
      f"{listing(near) or 'none'}"
    )
  for key, shape in shapes.items():
    if key in found and found[key] != shape:
      slot = slots[key]
      table = kind(slot.site.entry) == "embedding" or slot.module.endswith(HEAD)
      raise LoraxError(
        f"{key} has the shape {found[key]}, and {shape} was expected"
        + ": where a vocabulary was resized, load the base with its vocab_size" * table
      )
    if slots[key].form.holds_places:
      continue
    if key in found and not jnp.issubdtype(tensors.dtypes[key], jnp.floating):
      dtype = tensors.dtypes[key]
      raise LoraxError(f"{key} holds {dtype}, not floating-point numbers")


def _is_idle(key: str) -> bool:
  """Checks whether a key has no effect on what an adapter computes.

  It is there by bias="all" alone, under any adapter's name, or of training alone.
  """
  wrapped = key.endswith(".bias") and re.search(
    r"\.(modules_to_save|original_module)\.", key
  )
  return bool(wrapped or re.search(r"\.lora_(velora|monteclora)_", key))


def _check_copy(
  key: str,
  stored: np.ndarray,
  slot: Slot,
  config: PeftConfig,
  adapter: Adapter,
  leaves: Mapping[str, Any],
) -> None:
  value = part_of(slot, config, adapter, leaves)
  if not np.array_equal(value.astype(stored.dtype), stored):
    other = "the base's own weight" if slot.method is None else f"that of {slot.path}"
    raise LoraxError(
      f"{key} differs from {other}, which it should repeat: the folder is of another "
      "base, or of one whose vocabulary was changed"
    )


def _delta(
  sites: _Sites, leaf: Any, config: PeftConfig, shared: Mapping[str, np.ndarray]
) -> Delta:
  """One leaf's delta, layers stacked where the leaf's are.

  Args:
    shared: what all targets share, of which the delta has the first parts.
  """
  first = next(iter(sites.values()))
  slot = first.slot
  if slot.method is Tuned:
    return _tuned(sites, leaf)
  if slot.method is Rows:
    (rows,) = first.leaves.values()
    given = (jnp.asarray(leaf), slot.rows, slot.roles, _axis(slot))
    return Rows.of(jnp.asarray(rows), *given)
  layers = {site.index: layer.leaves for site, layer in sites.items()}
  scales = [config.scale(layer.slot.module) for layer in sites.values()]
  method, options = method_of(config), options_of(config, slot.module)
  kernel, named = _kernel(slot, {slot.path: leaf}), by_role(slot.roles)
  own = {}
  for name, x in shared.items():
    axes = resolved(method.axes[name], named)
    cuts = (slice(None if isinstance(i, str) else kernel[i]) for i in axes)
    own[name] = x[tuple(cuts)]
  for layer in sites.values():
    if options_of(config, layer.slot.module) != options:
      raise LoraxError(
        f"{peft_config.CONFIG_FILE}: {slot.module} and {layer.slot.module} differ in "
        f"{listing(method.selections)}, and their layers are stacked here: load the "
        "base with its layers apart: scan=False (--config.model.scan=false)"
      )
  with prefixed(slot.path):
    return stacking.stack(
      method,
      layers,
      scales,
      slot.roles,
      leaf.shape,
      config.lora_dropout,
      options,
      own,
    )


def _tuned(sites: _Sites, leaf: Any) -> Tuned:
  shape = tuple(leaf.shape)
  values = {site: next(iter(each.leaves.values())) for site, each in sites.items()}
  if len(sites) == 1:
    ((site, value),) = values.items()
    if site.shape(shape) == shape:
      return Tuned(jnp.asarray(value), leaf)
  full = np.zeros(shape, np.float32)
  for site, value in values.items():
    full[site.place(shape)] = value
  layers = sorted({site.index[0] for site in sites if site.index})
  if not layers or len(layers) == shape[0]:
    return Tuned(jnp.asarray(full), leaf)
  return Tuned(jnp.asarray(full[layers]), leaf, tuple(layers))
