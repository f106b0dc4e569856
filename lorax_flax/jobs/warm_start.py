"""Warm starts: adapters that were trained before, maybe on another task."""

import logging
from dataclasses import replace

import jax
import numpy as np

from lorax_flax.adapt.paths import map_with_path
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.peft import folder as peft
from lorax_flax.methods import METHODS, Adapter, Delta, KernelDelta, Tuned
from lorax_flax.models import registry

log = logging.getLogger(__name__)


def start_from(folder: str, adapter: Adapter, loaded: registry.Loaded) -> Adapter:
  """`adapter` with the weights of a PEFT folder.

  Its low-rank factors are taken, as the LoRA paper starts RTE, MRPC and STS-B from
  MNLI. What it trained in full, the head above all, is taken only where both have as
  many labels.

  Args:
    folder: PEFT's.
    adapter: a new one, with the weights that are trained from here on.

  Raises:
    LoraxError: the two differ in targets, rank or scale.
  """
  ours = getattr(loaded.config, "num_labels", None)  # Of a language model: none.
  theirs = peft.needs(folder, loaded.keymap).num_labels
  params = loaded.params
  if theirs is not None and ours is not None and theirs != ours:
    labels = loaded.keymap.label_paths
    params = map_with_path(
      lambda path, leaf: _with_last_axis(leaf, theirs) if path in labels else leaf,
      params,
    )
  found, _ = peft.read_adapter(folder, params, loaded.keymap)
  _check(folder, _factors(found), _factors(adapter))
  start = dict(adapter)
  for path, delta in adapter.items():
    other = found.get(path)
    if other is None or type(delta) is not type(other):
      continue
    fits = theirs == ours or path not in loaded.keymap.keys
    if isinstance(delta, KernelDelta) or (isinstance(delta, Tuned) and fits):
      start[path] = _with_trained(path, delta, other)
  head = "none there"
  if theirs is not None:
    same = theirs == ours
    head = "taken too" if same else f"new: it has {theirs} labels there and {ours} here"
  log.info(f"starting from {folder}: {len(_factors(found))} deltas; the head is {head}")
  return start


def _with_trained(path: str, delta: Delta, other: Delta) -> Delta:
  """The delta with the other's trained leaves.

  Raises:
    LoraxError: infinities, which stand for what a folder doesn't hold.
  """
  leaves = {name: other.leaves()[name] for name in delta.trained}
  if not all(np.isfinite(leaf).all() for leaf in leaves.values()):
    raise LoraxError(
      f"the folder's delta of {path!r} has infinities, as one saved with"
      " save_only_topk_weights has: it can be applied and merged, not trained on"
    )
  return replace(delta, **leaves)


def _factors(adapter: Adapter) -> dict[str, KernelDelta]:
  return {p: delta for p, delta in adapter.items() if isinstance(delta, KernelDelta)}


def _check(
  folder: str, theirs: dict[str, KernelDelta], ours: dict[str, KernelDelta]
) -> None:
  if differ := sorted(theirs.keys() ^ ours.keys()):
    there = [path for path in differ if path in theirs]
    only = "that adapter" if there else "lora.targets"
    raise LoraxError(
      f"init_adapter {folder} adapts other weights than lora.targets: only {only} has "
      f"{listing(there or differ, most=4)}"
    )
  for path, delta in ours.items():
    other = theirs[path]
    if type(delta) is not type(other):
      raise LoraxError(
        f"init_adapter {folder} has {type(other).__name__} at {path}, and this run "
        f"{type(delta).__name__}: set "
        f"--config.lora.method={METHODS.name_of(other)}"
      )
    if delta.rank != other.rank:
      raise LoraxError(
        f"init_adapter {folder} has rank {other.rank} at {path}, and this run rank "
        f"{delta.rank}: set --config.lora.rank={other.rank}"
      )
    own, stored = np.asarray(delta.scales()), np.asarray(other.scales())
    if not np.allclose(own, stored):
      alpha = float(stored.max()) * other.rank
      raise LoraxError(
        f"init_adapter {folder} scales its delta of {path} by {stored.flat[0]:g}, and "
        f"this run by {own.flat[0]:g}: set --config.lora.alpha={alpha:g}"
      )


def _with_last_axis(leaf: jax.Array, size: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((*leaf.shape[:-1], size), leaf.dtype)
