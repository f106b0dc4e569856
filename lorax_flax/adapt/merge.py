"""Deltas into the base and out again, in float32."""

import jax.numpy as jnp

from lorax_flax.adapt.paths import PyTree, flatten, map_with_path
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.methods import Adapter, BiasLoRA, DoRA, Followed, Tuned


def merge(params: PyTree, adapter: Adapter) -> PyTree:
  """params with every delta added: the same tree, and no added latency.

  Args:
    params: the base, any pytree of arrays.
    adapter: path to LoRA, another low-rank delta, Rows, or Tuned.

  Raises:
    LoraxError: a path that params does not have, a shape that does not fit, or LoRA
      with a bias where the base has no bias that could take it.
  """
  return _shifted(params, adapter, 1.0)


def unmerge(params: PyTree, adapter: Adapter) -> PyTree:
  """The base back from merged params, to rounding; tuned leaves and rows exactly.

  Raises:
    LoraxError: as `merge`, or DoRA, whose merged weights do not tell the base's norms.
  """
  for path, delta in adapter.items():
    if isinstance(delta, DoRA):
      raise LoraxError(
        f"DoRA cannot be taken out of {path!r}: merged weights do not tell the norms"
        " of the base. Keep the base"
      )
  return _shifted(params, adapter, -1.0)


def _shifted(params: PyTree, adapter: Adapter, sign: float) -> PyTree:
  leaves = flatten(params)
  for path in adapter:
    if path not in leaves:
      raise LoraxError(unknown("adapter path", path, leaves))

  biases = _biases(leaves, adapter)

  def shift(path, leaf):
    delta = adapter.get(path)
    new = leaf
    if isinstance(delta, Tuned):
      new = delta.put(leaf) if sign > 0 else delta.original
    elif isinstance(delta, Followed):
      new = delta.merged(leaf) if sign > 0 else delta.unmerged(leaf)
    if path in biases and not (isinstance(delta, Tuned) and sign < 0):
      new = new.astype(jnp.float32) + sign * biases[path]
    if new.shape != leaf.shape:
      raise LoraxError(
        f"the adapter's delta of {path!r} has shape {new.shape}, the base {leaf.shape}"
      )
    return new.astype(leaf.dtype)

  return map_with_path(shift, params)


def _biases(leaves: dict, adapter: Adapter) -> dict:
  """What LoRA's own biases add to the base's, by the path of the base's bias."""
  found = {}
  for path, delta in adapter.items():
    if not isinstance(delta, BiasLoRA):
      continue
    beside = "/".join([*path.split("/")[:-1], "bias"])
    added = delta.bias_delta(leaves[path].shape)
    if beside not in leaves or leaves[beside].shape != added.shape:
      raise LoraxError(
        f"the bias of LoRA at {path!r} cannot be merged: the base has no {beside!r} of"
        f" shape {added.shape}"
      )
    found[beside] = added
  return found
