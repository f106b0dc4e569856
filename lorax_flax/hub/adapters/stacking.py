"""Factors and tensors of single layers, put together into the deltas of our leaves."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.methods import LoRA, Tuned

# By the layer's index on a stacked leaf; None where the leaf is one layer's.
Layer = int | None


class Factors(NamedTuple):
  """One layer's: a (in, rank), b (rank, out), and what multiplies a @ b."""

  a: np.ndarray
  b: np.ndarray
  scale: float


def lora(layers: Mapping[Layer, Factors], leaf: Any, dropout: float = 0.0) -> LoRA:
  """The delta of one leaf, float32; smaller ranks padded with zeros to the largest."""
  found: dict[tuple[int, ...], dict[str, np.ndarray]] = {
    () if layer is None else (layer,): {"a": np.asarray(one.a), "b": np.asarray(one.b)}
    for layer, one in layers.items()
  }
  scales = [one.scale for one in layers.values()]
  parts, scale, chosen = stacked(found, scales, leaf.shape)
  roles = ("in", "out") if () in found else ("stack", "in", "out")
  return LoRA(parts["a"], parts["b"], scale, roles, dropout, chosen)


def stacked(
  parts: Mapping[tuple[int, ...], Mapping[str, np.ndarray]],
  scales: Sequence[float],
  shape: Sequence[int],
) -> tuple[dict[str, jax.Array], jax.Array, tuple[int, ...] | None]:
  """The parts of a low-rank delta, of all layers that have them.

  Args:
    parts: by index on the leaf's leading axes, and by name: a (…, rank), b (…, rank,
      out), others without a rank. Smaller ranks are padded with zeros to the largest.
    scales: of each.
    shape: of the leaf.

  Returns:
    The parts by name, float32; their scale; the layers, None for all of them.

  Raises:
    LoraxError: of one layer, some of the weights stacked there have no parts.
  """
  first = next(iter(parts))
  if not first:
    whole = {name: jnp.asarray(x, jnp.float32) for name, x in parts[()].items()}
    return whole, jnp.float32(scales[0]), None
  depth = len(first)
  layers = sorted({index[0] for index in parts})
  indices = [*itertools.product(layers, *map(range, shape[1:depth]))]
  if missing := [index for index in indices if index not in parts]:
    raise LoraxError(f"no factors for {missing[:4]} of the weights stacked there")
  stack = (len(layers), *shape[1:depth])
  rank = max(each["a"].shape[-1] for each in parts.values())
  found = {}
  for name in parts[first]:
    values = np.stack([_padded(parts[index][name], name, rank) for index in indices])
    values = values.reshape(*stack, *values.shape[1:])
    found[name] = jnp.asarray(values, jnp.float32)
  given = dict(zip(parts, scales, strict=True))
  every = np.array([given[index] for index in indices], np.float32).reshape(stack)
  same = (every == every.flat[0]).all()
  scale = jnp.asarray(every.flat[0] if same else every)
  return found, scale, None if len(layers) == shape[0] else tuple(layers)


def _padded(value: np.ndarray, name: str, rank: int) -> np.ndarray:
  if name not in ("a", "b"):
    return value
  axis = value.ndim - (1 if name == "a" else 2)
  widths = [(0, rank - n if i == axis else 0) for i, n in enumerate(value.shape)]
  return np.pad(value, widths)


def own_rank(a: np.ndarray, b: np.ndarray) -> int:
  """The rank of a (…, rank) and b (…, rank, out) less the zeros that pad them."""
  b = np.moveaxis(b, -2, -1)
  used = [x.reshape(-1, x.shape[-1]).any(axis=0) for x in (a, b)]
  places = np.flatnonzero(used[0] | used[1])
  return int(places[-1]) + 1 if len(places) else 1


def tuned(layers: Mapping[Layer, np.ndarray], leaf: Any) -> Tuned:
  """A leaf trained in full, float32; layers that are not given stay the base's."""
  if None in layers:
    return Tuned(jnp.asarray(layers[None], jnp.float32), leaf)
  value = np.array(leaf, np.float32)
  for layer, tensor in layers.items():
    value[layer] = tensor
  return Tuned(jnp.asarray(value), leaf)


def most_common(values: Mapping[str, Any]) -> Any:
  """The value that most have; the first of these where several do."""
  return Counter(values.values()).most_common(1)[0][0]


def of_layer(delta: LoRA, layer: Layer) -> Factors:
  """One layer of a delta, float32, less the zeros that pad it to its neighbours' rank.

  Args:
    layer: index on the stacked leaf, which the delta must adapt; None: not stacked.
  """
  a, b = np.asarray(delta.a, np.float32), np.asarray(delta.b, np.float32)
  if layer is None:
    return Factors(a, b, float(delta.scale))
  place = layer if delta.layers is None else delta.layers.index(layer)
  scale = np.broadcast_to(np.asarray(delta.scale), (len(a),))[place]
  rank = own_rank(a[place], b[place])
  return Factors(a[place, :, :rank], b[place, :rank], float(scale))
