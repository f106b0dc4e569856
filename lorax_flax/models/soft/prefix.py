"""Prefix tuning (arXiv 2101.00190): trained keys and values before those of the tokens.

They are what a cache would hold of tokens before: keys are not rotated any more, and
the positions of the tokens go on after them.

Shapes: L layers, P length of the prefix, G heads of keys and values, K head size.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lorax_flax.models.cache import Cache
from lorax_flax.models.soft.part import Part

PART = Part(std={"states": 1.0}, reads=("length", "std"), peft="PREFIX_TUNING")
_AXES = ("layers", "single", "positions", "heads", "head")


class Prefix(nn.Module):
  """The states of all layers, keys and then values.

  Attributes:
    shape: (L, 2, P, G, K).
    std: of fresh ones.
  """

  shape: tuple[int, ...]
  std: float

  @nn.compact
  def __call__(self) -> Any:
    init = nn.with_logical_partitioning(nn.initializers.normal(self.std), _AXES)
    return self.param("states", init, self.shape)


def written(cache: Cache, states: jax.Array, stacked: bool) -> Cache:
  """A cache with the prefix in the columns of the first places.

  Args:
    cache: without tokens.
    states: Lx2xPxGxK.
    stacked: the cache's layers are.
  """

  def write(x: jax.Array, own: jax.Array) -> jax.Array:
    columns = x.shape[-2]
    # Of places that share a column of a ring, the last alone.
    places = np.arange(own.shape[-3])[-columns:]
    rows = own[..., places, :, :].swapaxes(-3, -2)[..., None, :, :, :]
    return x.at[..., places % columns, :].set(rows.astype(x.dtype))

  layers: Any
  if stacked:
    layers = tuple(write(x, states[:, i]) for i, x in enumerate(cache.layers))
  else:
    layers = tuple(
      tuple(write(x, states[layer, i]) for i, x in enumerate(both))
      for layer, both in enumerate(cache.layers)
    )
  return dataclasses.replace(cache, layers=layers, begun=True)
