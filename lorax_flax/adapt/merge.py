"""Deltas into the base and out again, in float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.adapt.paths import PyTree, arrays, beside, map_with_path
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.methods import Adapter
from lorax_flax.methods.delta import OnBias
from lorax_flax.quant import Deferred, dense


def merge(params: PyTree, adapter: Adapter) -> PyTree:
  """params with every delta added: the same tree, and no added latency.

  Leaves without a delta are returned as they are, arrays or not; params is not changed.
  A quantised leaf with a delta becomes dense, in its dtype.

  Args:
    params: the base, any pytree.
    adapter: path to delta, of any method.

  Raises:
    LoraxError: a path that params does not have, a shape that does not fit, or LoRA
      with a bias where the base has no bias that could take it.
  """
  return _shifted(params, adapter, 1.0)


def deferred(params: PyTree, adapter: Adapter) -> PyTree:
  """`merge` of leaves that are made at each use and not kept (`quant.Deferred`).

  Raises:
    LoraxError: as `merge`; a shape that does not fit, when the leaf is made.
  """
  new = _shifts(params, adapter, 1.0)

  def defer(path: str, leaf: Any) -> Any:
    if path not in new:
      return leaf
    return Deferred(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), new[path])

  return map_with_path(defer, params)


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


def without_place(params: PyTree, adapter: Adapter) -> Adapter:
  """The deltas that `merge` refuses: their bias has no place in the base."""
  leaves = arrays(params)
  return {
    path: delta
    for path, delta in adapter.items()
    if delta.has_bias and beside(path, delta.bias_name) not in leaves
  }


def kept(
  params: PyTree, adapter: Adapter, stored: Callable[[str, jax.Array], jax.Array]
) -> dict[str, tuple[float, float]]:
  """Measures what is left of each delta where merged weights are rounded to be stored.

  Args:
    stored: (path, a leaf) -> that leaf after it was stored and read again.

  Returns:
    By path, of each leaf that changes: the product of its change and of that which is
    left, and the change's square. The sum of the first over that of the second is the
    share that is kept.
  """
  leaves, found = arrays(params), {}
  for path, delta in adapter.items():
    if path not in leaves:
      raise LoraxError(unknown("adapter path", path, leaves))
    names = {path, beside(path, delta.bias_name)} & leaves.keys()
    before = {name: dense(leaves[name]).astype(jnp.float32) for name in names}
    for name, after in merge(before, {path: delta}).items():
      change = after - before[name]
      left = stored(name, after) - stored(name, before[name])
      product = float(jnp.vdot(left, change)), float(jnp.vdot(change, change))
      if product[1]:
        found[name] = product
  return found


def _shifted(params: PyTree, adapter: Adapter, sign: float) -> PyTree:
  new = _shifts(params, adapter, sign)
  return map_with_path(lambda path, leaf: new[path]() if path in new else leaf, params)


def _shifts(
  params: PyTree, adapter: Adapter, sign: float
) -> dict[str, Callable[[], jax.Array]]:
  """Makers, by path, of each leaf that changes: its delta added, or taken out."""
  leaves = arrays(params)
  for path in adapter:
    if path not in leaves:
      raise LoraxError(unknown("adapter path", path, leaves))

  biases = _biases(leaves, adapter)

  def shift(path: str) -> jax.Array:
    leaf, delta = leaves[path], adapter.get(path)
    new = dense(leaf)
    scale, added = biases.get(path, OnBias())
    if path in biases and sign < 0:
      new = new.astype(jnp.float32) - (0.0 if added is None else added)
      new = new if scale is None else new / scale
    if delta is not None:
      delta.check(path, leaf.shape)
      new = delta.merged(new) if sign > 0 else delta.unmerged(new)
    if path in biases and sign > 0:
      new = new.astype(jnp.float32) * (1.0 if scale is None else scale)
      new = new if added is None else new + added
    return new.astype(leaf.dtype)

  changed = adapter.keys() | biases.keys()
  return {path: functools.partial(shift, path) for path in changed}


def _biases(leaves: dict, adapter: Adapter) -> dict[str, OnBias]:
  """The deltas' changes of the base's biases, by the path of the bias."""
  found = {}
  for path, delta in adapter.items():
    change, at = delta.on_bias(leaves[path]), beside(path, delta.bias_name)
    shapes = {x.shape for x in change if x is not None}
    if shapes and at in leaves and {leaves[at].shape} == shapes:
      found[at] = change
    elif change.added is not None or (shapes and at in leaves):
      raise LoraxError(
        f"the bias of LoRA at {path!r} cannot be merged: the base has no {at!r} of"
        f" shape {shapes.pop()}. It can be applied (lora.apply, experiments.predict)"
      )
  return found
