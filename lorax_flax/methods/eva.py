"""EVA (arXiv 2410.07170): LoRA that starts with the directions of its inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.methods.moments import Moments

# rho: a rank may become so many times itself, where ranks are given to the sites whose
# inputs' variance they explain most of; 1 leaves them. whiten: directions are divided
# by the root of their singular value. adjust_scale: alpha changes as the rank does.
OPTIONS: Mapping[str, Any] = {"rho": 2.0, "whiten": False, "adjust_scale": True}


class Directions(NamedTuple):
  """Principal components of a kernel's inputs, the largest first.

  Attributes:
    vectors: (*stack, n, k), what the first factor starts with.
    shares: (*stack, k), of the variance that each explains.
  """

  vectors: jax.Array
  shares: jax.Array


def directions(moments: Moments, k: int, whiten: bool) -> Directions:
  """The first k components; the entry of largest size in each is positive.

  PEFT takes an incremental SVD, cut to k components after each batch; these are those
  of all batches at once.
  """
  covariance = moments.covariance
  values, vectors = jnp.linalg.eigh(covariance)
  values = jnp.maximum(values[..., ::-1][..., :k], 0.0)
  vectors = vectors[..., ::-1][..., :k]
  largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
  vectors = vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=-2))
  total = jnp.trace(covariance, axis1=-2, axis2=-1)
  if whiten:
    singular = jnp.sqrt(values * moments.total[..., None])
    vectors = vectors / jnp.sqrt(singular)[..., None, :]
  return Directions(vectors, values / total[..., None])


def most(rank: int, rho: float) -> int:
  """The largest rank that redistribution may give.

  Raises:
    LoraxError: rho is below 1.
  """
  if rho < 1:
    raise LoraxError(f"eva: rho={rho:g} must be at least 1, which leaves the ranks")
  return round(rank * rho)


def redistributed(shares: Sequence[np.ndarray], budget: int) -> list[int]:
  """The rank of each site: its number among the `budget` largest shares of all."""
  sites = np.repeat(np.arange(len(shares)), [len(x) for x in shares])
  order = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
  return np.bincount(sites[order], minlength=len(shares)).tolist()
