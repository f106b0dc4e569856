"""Random numbers that methods start with, and those of torch's CPU generator."""

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np


def uniform(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
  """Uniform numbers within 1 / sqrt(fan), float32: torch's kaiming_uniform, a = √5."""
  bound = 1 / math.sqrt(fan)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Torch:
  """The stream of torch's CPU generator (MT19937) after manual_seed."""

  def __init__(self, seed: int):
    self._stream = np.random.RandomState(seed)

  def _words(self, n: int) -> np.ndarray:
    return np.frombuffer(self._stream.bytes(4 * n), "<u4")

  def uniform(self, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """Tensor.uniform_(-bound, bound), float32, to rounding."""
    unit = (self._words(math.prod(shape)) % (1 << 24)).astype(np.float32) / (1 << 24)
    low = np.float32(-bound)
    return (unit * (np.float32(bound) - low) + low).reshape(shape)

  def choice(self, size: int, n: int) -> np.ndarray:
    """The first n of randperm(size), size < 2³²."""
    moved: dict[int, int] = {}
    words = self._words(n).astype(np.int64)
    for i, word in enumerate(words):
      j = i + int(word) % (size - i)
      moved[i], moved[j] = moved.get(j, j), moved.get(i, i)
    return np.array([moved[i] for i in range(n)], np.int64)


@lru_cache(maxsize=64)
def places(size: int, n: int, seed: int) -> np.ndarray:
  """The first n places of torch's random order of `size` ones, by a seed."""
  return Torch(seed).choice(size, n)
