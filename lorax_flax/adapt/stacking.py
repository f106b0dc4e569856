"""Leaves of single layers, put together into the deltas of our leaves, and back."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.methods import Delta, KernelDelta, Tuned
from lorax_flax.methods.axes import LeafAxes, by_role, resolved

# A place on the base's leading axes: of the layer, of the expert; () of one layer.
Index = tuple[int, ...]


class Layer(NamedTuple):
  """One layer of a delta.

  Attributes:
    leaves: its trained leaves but for those that all deltas have in common, float32,
      without the zeros that pad it to the rank of the other layers.
    scale: (), or of the axes stacked below the layer.
    rank: its own, 0 of a method that has none.
  """

  leaves: dict[str, np.ndarray]
  scale: np.ndarray
  rank: int


def stack(
  method: type[KernelDelta],
  layers: Mapping[Index, Mapping[str, np.ndarray]],
  scales: Sequence[float],
  roles: tuple[str, ...],
  shape: Sequence[int],
  dropout: float = 0.0,
  options: Mapping[str, Any] | None = None,
  shared: Mapping[str, np.ndarray] | None = None,
) -> KernelDelta:
  """The delta of a leaf of the base, by those of its layers.

  Args:
    layers: leaves by name, of each layer that has some. Smaller ranks are padded with
      zeros to the largest.
    scales: of each.
    roles: of the axes of one layer.
    shape: of the base's leaf.
    options: of the method.
    shared: leaves that all layers have in common.

  Raises:
    LoraxError: of one layer, some of the weights stacked there have no leaves.
  """
  first = next(iter(layers))
  common = {name: jnp.asarray(x, jnp.float32) for name, x in (shared or {}).items()}
  if not first:
    whole = {name: jnp.asarray(numbers(x)) for name, x in layers[()].items()}
    return method.of({**whole, **common}, scales[0], roles, dropout, options=options)
  depth = len(first)
  chosen = sorted({index[0] for index in layers})
  indices = [*itertools.product(chosen, *map(range, shape[1:depth]))]
  if missing := [index for index in indices if index not in layers]:
    raise LoraxError(f"no factors for {missing[:4]} of the weights stacked there")
  outer = (len(chosen), *shape[1:depth])
  found = {}
  for name in layers[first]:
    axes = resolved(method.axes[name], by_role(roles))
    values = _stacked([layers[index][name] for index in indices], axes)
    found[name] = jnp.asarray(numbers(values.reshape(*outer, *values.shape[1:])))
  given = dict(zip(layers, scales, strict=True))
  every = np.array([given[index] for index in indices], np.float32).reshape(outer)
  same = (every == every.flat[0]).all()
  scale = every.flat[0] if same else every
  some = None if len(chosen) == shape[0] else tuple(chosen)
  given_roles = ("stack",) * depth + roles
  return method.of(
    {**found, **common}, scale, given_roles, dropout, some, options=options
  )


def numbers(leaf: Any) -> np.ndarray:
  """A leaf as float32, or as the integers that it holds."""
  leaf = np.asarray(leaf)
  return leaf if leaf.dtype.kind == "i" else leaf.astype(np.float32)


def unstack(delta: KernelDelta, index: Index) -> Layer:
  """One layer of a delta, which must adapt it."""
  place, depth = place_of(delta, index), len(index)
  own = [name for name in delta.trained if name not in delta.common]
  leaves = {n: np.asarray(delta.leaves()[n], np.float32)[place] for n in own}
  axes = {name: delta.leaf_axes(name)[depth:] for name in leaves}
  is_padded = index and delta.rank and delta.pads_rank
  rank = _own_rank(leaves, axes) if is_padded else delta.rank
  leaves = {name: trimmed(x, axes[name], rank) for name, x in leaves.items()}
  return Layer(leaves, np.asarray(delta.scales(), np.float32)[place], rank)


def place_of(delta: Delta, index: Index) -> Index:
  """The place of a layer in a delta that may have some of the layers alone."""
  if not index or delta.layers is None:
    return index
  return (delta.layers.index(index[0]), *index[1:])


def has_layer(delta: Delta, index: Index) -> bool:
  """Checks whether a delta changes this layer of its leaf."""
  return delta.layers is None or index[0] in delta.layers


def trimmed(leaf: np.ndarray, axes: LeafAxes, rank: int) -> np.ndarray:
  """A leaf of one layer less what is beyond this rank."""
  return leaf[tuple(slice(rank if axis == "rank" else None) for axis in axes)]


def tuned(layers: Mapping[Index, np.ndarray], leaf: Any) -> Tuned:
  """A leaf trained in full, float32; layers that are not given stay the base's."""
  if () in layers:
    return Tuned(jnp.asarray(layers[()], jnp.float32), leaf)
  value = np.array(leaf, np.float32)
  for index, tensor in layers.items():
    value[index] = tensor
  return Tuned(jnp.asarray(value), leaf)


def most_common(values: Mapping[str, Any]) -> Any:
  """The value that most have; the first of these where several do."""
  return Counter(values.values()).most_common(1)[0][0]


def _stacked(leaves: Sequence[np.ndarray], axes: LeafAxes) -> np.ndarray:
  """Leaves of layers on a new first axis, with zeros up to the largest rank."""
  shape = np.max([x.shape for x in leaves], axis=0)
  widths = [
    [
      (0, n - m if axis == "rank" else 0)
      for n, m, axis in zip(shape, x.shape, axes, strict=True)
    ]
    for x in leaves
  ]
  # A leaf of one number has no axis to pad.
  padded = [np.pad(x, w) if w else x for x, w in zip(leaves, widths, strict=True)]
  return np.stack(padded)


def _own_rank(leaves: Mapping[str, np.ndarray], axes: Mapping[str, LeafAxes]) -> int:
  """The rank of one layer's leaves less the zeros that pad them."""
  rank = 1
  for name, leaf in leaves.items():
    for place, axis in enumerate(axes[name]):
      if axis == "rank":
        used = np.moveaxis(leaf, place, 0).reshape(leaf.shape[place], -1).any(axis=1)
        rank = max(rank, *(1 + np.flatnonzero(used)), 0)
  return int(rank)
