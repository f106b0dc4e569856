"""Moments of a kernel's inputs, which some adapters start from."""

from typing import NamedTuple

import jax


class Moments(NamedTuple):
  """Sums over examples of a kernel's inputs x, each with its weight w.

  Attributes:
    second: (*stack, n, n), of w x xᵀ, float32; n is the number of inputs.
    first: (*stack, n), of w x.
    total: (*stack,), of the weights, or what `KernelDelta.weigh` counts instead.
  """

  second: jax.Array
  first: jax.Array
  total: jax.Array

  @property
  def mean_square(self) -> jax.Array:
    """The mean of x xᵀ, (*stack, n, n)."""
    return self.second / self.total[..., None, None]

  @property
  def covariance(self) -> jax.Array:
    """The mean of (x - mean) (x - mean)ᵀ, (*stack, n, n)."""
    mean = self.first / self.total[..., None]
    return self.mean_square - mean[..., :, None] * mean[..., None, :]
