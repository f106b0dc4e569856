"""Trained and frozen leaves: as masks, as two trees, and as an optimiser."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from lorax_flax.adapt.paths import PyTree, map_with_path
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.methods import Adapter, Delta


def trainable_mask(adapter: Adapter) -> PyTree:
  """The adapter's tree with True at the leaves that train, False at the others."""
  return leaf_mask(adapter, lambda delta: delta.trained)


def leaf_mask(adapter: Adapter, chosen: Callable[[Delta], Collection[str]]) -> PyTree:
  """The adapter's tree with True at the leaves that `chosen(delta)` names."""

  def mask(delta: Delta) -> Delta:
    names = chosen(delta)
    return replace(delta, **{name: name in names for name in delta.leaves()})

  return {path: mask(delta) for path, delta in adapter.items()}


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
  """Splits a tree by a mask into (where True, where False), None where absent."""
  chosen = jax.tree.map(lambda m, x: x if m else None, mask, tree)
  rest = jax.tree.map(lambda m, x: None if m else x, mask, tree)
  return chosen, rest


def combine(chosen: PyTree, rest: PyTree) -> PyTree:
  """Puts together what `partition` split."""

  def pick(x, y):
    if (x is None) == (y is None):
      raise LoraxError("combine: a leaf is in both trees, or in neither")
    return y if x is None else x

  return jax.tree.map(pick, chosen, rest, is_leaf=lambda x: x is None)


def replaced(adapter: Adapter) -> set[str]:
  """Paths of the base's leaves that a delta is in the place of."""
  return {path for path, delta in adapter.items() if delta.replaces}


def without_replaced(
  params: PyTree, adapter: Adapter, instead: Callable[[Any], Any]
) -> PyTree:
  """params with `instead(leaf)` for each leaf that a delta is in the place of."""
  gone = replaced(adapter)
  return map_with_path(lambda path, x: instead(x) if path in gone else x, params)


def without(adapter: Adapter, chosen: Callable[[Delta], Collection[str]]) -> Adapter:
  """The adapter with `absent` leaves where `chosen(delta)` names them."""
  return {
    path: replace(d, **{name: absent(d.leaves()[name]) for name in chosen(d)})
    for path, d in adapter.items()
  }


def absent(leaf: Any) -> np.ndarray:
  """NaN of a leaf's shape and dtype, in no memory: for what nothing reads any more."""
  return np.broadcast_to(np.asarray(np.nan, leaf.dtype), leaf.shape)


def params_mask(params: PyTree, paths: Any) -> PyTree:
  """A mask over one full tree: True at these paths.

  Raises:
    LoraxError: a path that is not in the tree.
  """
  known: list[str] = []
  requested = set(paths)

  def mark(path, leaf):
    known.append(path)
    return path in requested

  mask = map_with_path(mark, params)
  for path in sorted(requested - set(known)):
    raise LoraxError(unknown("parameter", path, known))
  return mask


def freeze(
  tx: optax.GradientTransformation, mask: PyTree
) -> optax.GradientTransformation:
  """An optimiser for one full tree: `tx` where the mask is True, zero elsewhere.

  A bare optax.masked hands the raw gradient through to the frozen leaves; here their
  update is zero, and no optimiser state exists for them.
  """
  frozen = jax.tree.map(lambda m: not m, mask)
  return optax.chain(optax.masked(tx, mask), optax.masked(optax.set_to_zero(), frozen))
