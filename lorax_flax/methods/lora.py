"""LoRA (arXiv 2106.09685): W + scale * a @ b, the product never formed."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lorax_flax.methods.low_rank import LowRank, axes_of, dense, sizes_of

__all__ = ["LoRA", "axes_of", "dense", "init"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA(LowRank):
  """The low-rank delta of one kernel: W' = W + scale * a @ b. Fields of `LowRank`."""


def init(
  key: jax.Array,
  shape: tuple[int, ...],
  roles: tuple[str, ...],
  *,
  rank: int,
  scale: float | tuple[float, ...],
  style: str,
  dropout: float = 0.0,
  layers: tuple[int, ...] | None = None,
  ranks: tuple[int, ...] | None = None,
) -> LoRA:
  """The starting delta, zero as a whole.

  Args:
    key: a key of this path alone.
    shape, roles: the kernel's.
    style: "uniform": a uniform within 1 / sqrt(fan in), b zero (PEFT's default, torch
      kaiming_uniform with a = sqrt 5); "gaussian": a normal with deviation 1 / r, b
      zero; "embedding": a zero, b normal(0, 1) (PEFT's Embedding).
    scale: one for all layers, or one for each that is adapted.
    layers: indices on the leading stack axis that are adapted; None for all.
    ranks: of each of these; a layer's factors are zero beyond its own.
  """
  stack, ins, outs = (sizes_of(shape, roles, role) for role in ("stack", "in", "out"))
  a_shape, b_shape = (*ins, rank), (rank, *outs)

  def draw(k):
    if style == "embedding":
      return jnp.zeros(a_shape), jax.random.normal(k, b_shape, jnp.float32)
    if style == "gaussian":
      return jax.random.normal(k, a_shape, jnp.float32) / rank, jnp.zeros(b_shape)
    bound = 1 / math.sqrt(math.prod(ins))
    a = jax.random.uniform(k, a_shape, jnp.float32, -bound, bound)
    return a, jnp.zeros(b_shape)

  if not stack:
    a, b = draw(key)
  else:
    # Each place on the stack draws from its own index, so that neither the number of
    # layers nor the selection changes what a layer starts with.
    indices = jnp.arange(math.prod(stack), dtype=jnp.uint32).reshape(stack)
    if layers is not None:
      indices = indices[jnp.asarray(layers)]
    flat = indices.reshape(-1)
    a, b = jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(flat)
    a, b = (x.reshape(indices.shape + x.shape[1:]) for x in (a, b))
  if ranks is not None:
    own = lambda x: jnp.asarray(ranks).reshape(-1, *[1] * (x.ndim - 1))
    along = lambda x, axis: jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    # A gaussian's deviation is that of the layer's own rank.
    a = a * (rank / own(a)) if style == "gaussian" else a
    a = jnp.where(along(a, a.ndim - 1) < own(a), a, 0.0)
    b = jnp.where(along(b, b.ndim - 1 - len(outs)) < own(b), b, 0.0)
  return LoRA(a, b, jnp.asarray(scale, jnp.float32), roles, dropout, layers)
