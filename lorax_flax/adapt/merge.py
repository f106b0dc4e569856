"""Deltas into the base and out again, in float32."""

import jax.numpy as jnp

from lorax_flax.adapt.paths import PyTree, flatten, map_with_path
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.methods import Adapter, LoRA, Tuned


def merge(params: PyTree, adapter: Adapter) -> PyTree:
  """params with every delta added: the same tree, and no added latency.

  Args:
    params: the base, any pytree of arrays.
    adapter: path to LoRA or Tuned.

  Raises:
    LoraxError: a path that params does not have, or a shape that does not fit.
  """
  return _shifted(params, adapter, 1.0)


def unmerge(params: PyTree, adapter: Adapter) -> PyTree:
  """The base back from merged params, to rounding; tuned leaves exactly."""
  return _shifted(params, adapter, -1.0)


def _shifted(params: PyTree, adapter: Adapter, sign: float) -> PyTree:
  leaves = flatten(params)
  for path in adapter:
    if path not in leaves:
      raise LoraxError(unknown("adapter path", path, leaves))

  def shift(path, leaf):
    delta = adapter.get(path)
    if delta is None:
      return leaf
    if isinstance(delta, Tuned):
      new = delta.value if sign > 0 else delta.original
    else:
      assert isinstance(delta, LoRA)
      added = delta.delta(leaf.shape)
      new = leaf.astype(jnp.float32) + sign * jnp.broadcast_to(added, added.shape)
    if new.shape != leaf.shape:
      raise LoraxError(
        f"the adapter's delta of {path!r} has shape {new.shape}, the base {leaf.shape}"
      )
    return new.astype(leaf.dtype)

  return map_with_path(shift, params)
