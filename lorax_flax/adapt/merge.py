"""Deltas into the base and out again, in float32."""

import jax.numpy as jnp

from lorax_flax.adapt.paths import PyTree, flatten, map_with_path
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.methods import Adapter


def merge(params: PyTree, adapter: Adapter) -> PyTree:
  """params with every delta added: the same tree, and no added latency.

  Args:
    params: the base, any pytree of arrays.
    adapter: path to delta, of any method.

  Raises:
    LoraxError: a path that params does not have, a shape that does not fit, or LoRA
      with a bias where the base has no bias that could take it.
  """
  return _shifted(params, adapter, 1.0)


def unmerge(params: PyTree, adapter: Adapter) -> PyTree:
  """The base back from merged params, to rounding; tuned leaves and rows exactly.

  Raises:
    LoraxError: as `merge`, or a method that can't be undone (DoRA: merged weights do
      not tell the base's norms).
  """
  for path, delta in adapter.items():
    if delta.irreversible:
      raise LoraxError(
        f"{type(delta).__name__} cannot be taken out of {path!r}: {delta.irreversible}."
        " Keep the base"
      )
  return _shifted(params, adapter, -1.0)


def _shifted(params: PyTree, adapter: Adapter, sign: float) -> PyTree:
  leaves = flatten(params)
  for path in adapter:
    if path not in leaves:
      raise LoraxError(unknown("adapter path", path, leaves))

  biases = _biases(leaves, adapter)

  def shift(path, leaf):
    delta, new = adapter.get(path), leaf
    if path in biases and sign < 0:
      new = new.astype(jnp.float32) - biases[path]
    if delta is not None:
      delta.check(path, leaf.shape)
      new = delta.merged(new) if sign > 0 else delta.unmerged(new)
    if path in biases and sign > 0:
      new = new.astype(jnp.float32) + biases[path]
    return new.astype(leaf.dtype)

  return map_with_path(shift, params)


def _biases(leaves: dict, adapter: Adapter) -> dict:
  """The deltas' additions to the base's biases, by the path of the bias."""
  found = {}
  for path, delta in adapter.items():
    added = delta.added_bias(leaves[path])
    if added is None:
      continue
    beside = "/".join([*path.split("/")[:-1], delta.bias_name])
    if beside not in leaves or leaves[beside].shape != added.shape:
      raise LoraxError(
        f"the bias of LoRA at {path!r} cannot be merged: the base has no {beside!r} of"
        f" shape {added.shape}"
      )
    found[beside] = added
  return found
