"""Rotations of a kernel's inputs, block by block; the common part of OFT and BOFT."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import Shape, fans, quotient
from lorax_flax.methods.kernel_delta import KernelDelta


def block_sizes(
  shape: Shape, roles: Sequence[str], sizes: Mapping[str, Any]
) -> dict[str, Any]:
  """`sizes` and the number of blocks of block_size inputs.

  Raises:
    LoraxError: a block size that does not divide the inputs.
  """
  fan_in, _ = fans(shape, roles)
  blocks = quotient("block_size", sizes["block_size"], fan_in, "inputs", shape, least=2)
  return {**sizes, "blocks": blocks}


def cayley(skew: jax.Array) -> jax.Array:
  """(I - S)(I + S)⁻¹ of skew-symmetric matrices, (..., n, n): rotations."""
  one = identity(skew)
  return jnp.linalg.solve(one + skew, one - skew)  # the two commute


def identity(like: jax.Array) -> jax.Array:
  """Identity matrices of this shape, (..., n, n)."""
  return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def factors(
  delta: KernelDelta, rotation: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """blk(R) W as W + (blk(R) - I) W, the two factors in the layout of `Parts`.

  The second is W itself: neither a rotated kernel nor a gradient of its size is formed.

  Args:
    rotation: R, (*stack, blocks, n, n).
    w: the kernel.
  """
  *stack, blocks, n, _ = rotation.shape
  change = rotation - identity(rotation)
  a = jnp.einsum("...bij,bc->...bicj", change, jnp.eye(blocks))
  a = a.reshape((*stack, blocks * n, blocks * n))
  return (
    delta.placed(a, ("stack", "in", "rank"), w.shape),
    delta.placed(delta.matrices(w), ("stack", "rank", "out"), w.shape),
  )


def rotated_back(delta: KernelDelta, rotation: jax.Array, w: jax.Array) -> jax.Array:
  """blk(R)⁻¹ W, dense, float32."""
  x = delta.matrices(w)
  *stack, blocks, n, _ = rotation.shape
  by_block = x.reshape((*stack, blocks, n, x.shape[-1]))
  back = jnp.linalg.solve(rotation, by_block).reshape(x.shape)
  change = delta.placed(back - x, ("stack", "in", "out"), w.shape)[..., 0]
  return w.astype(jnp.float32) + change
