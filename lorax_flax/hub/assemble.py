"""Factors and tensors of single layers, put together into the deltas of our leaves."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

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
  if None in layers:
    one = layers[None]
    a, b = (jnp.asarray(x, jnp.float32) for x in (one.a, one.b))
    return LoRA(a, b, jnp.float32(one.scale), ("in", "out"), dropout)
  indices = sorted(layer for layer in layers if layer is not None)
  rank = max(layers[i].a.shape[1] for i in indices)
  missing = {i: (0, rank - layers[i].a.shape[1]) for i in indices}
  every_a = [np.pad(layers[i].a, ((0, 0), missing[i])) for i in indices]
  every_b = [np.pad(layers[i].b, (missing[i], (0, 0))) for i in indices]
  scales = np.array([layers[i].scale for i in indices], np.float32)
  return LoRA(
    jnp.asarray(np.stack(every_a), jnp.float32),
    jnp.asarray(np.stack(every_b), jnp.float32),
    jnp.asarray(scales[0] if (scales == scales[0]).all() else scales),
    ("stack", "in", "out"),
    dropout,
    None if len(indices) == leaf.shape[0] else tuple(indices),
  )


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
  used = np.flatnonzero(a[place].any(axis=0) | b[place].any(axis=1))
  rank = int(used[-1]) + 1 if len(used) else 1
  return Factors(a[place, :, :rank], b[place, :rank], float(scale))
