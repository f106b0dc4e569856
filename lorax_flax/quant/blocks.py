"""Blocks of weights that share a scale, and two 4-bit codes in a byte."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint


def split(x: jax.Array, size: int) -> jax.Array:
  """The last axis as (blocks, size)."""
  return x.reshape((*x.shape[:-1], -1, size))


def join(x: jax.Array) -> jax.Array:
  """The last two axes as one."""
  return x.reshape((*x.shape[:-2], -1))


def absmax(x: jax.Array) -> jax.Array:
  return jnp.abs(x).max(-1)


def inverse(x: jax.Array) -> jax.Array:
  """1 / x; 0 for 0, so that a block of zeros has codes of zeros."""
  return jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)


def nearest(x: jax.Array, code: np.ndarray) -> jax.Array:
  """The index of the nearest value of a sorted code book, uint8; the lower of two.

  Counted in bytes: `jnp.searchsorted` keeps three arrays of x's size as it counts.
  """
  bounds = ((code[:-1] + code[1:]) / 2).reshape((1,) * x.ndim + (-1,))
  return (x[..., None] > bounds).sum(-1, dtype=jnp.uint8)


def pack(codes: jax.Array) -> jax.Array:
  """Pairs of 4-bit codes along the last axis as bytes, the first in the high bits."""
  return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpacked(
  packed: jax.Array,
  values: Callable[[jax.Array], jax.Array],
  scales: jax.Array,
  dtype: Any,
) -> jax.Array:
  """values(codes) * scales of the codes of `pack`, computed in float32.

  Compilers store what is interleaved: it is of the final dtype, and made last.

  Args:
    scales: float32, with as many elements on the last axis as there are blocks.
    dtype: of the result.
  """
  # As they are stored: a TPU's compiler would copy the codes of all layers, once a
  # step, into the layout that it likes the weights to have.
  packed = with_layout_constraint(packed, Layout(tuple(range(packed.ndim))))
  pairs = packed.shape[-1] // scales.shape[-1]  # of codes in a block

  def scaled(codes):
    return join(split(values(codes), pairs) * scales[..., None]).astype(dtype)

  return join(jnp.stack([scaled(packed >> 4), scaled(packed & 15)], -1))


def looked_up(codes: jax.Array, values: Sequence[float]) -> jax.Array:
  """values[codes] for 4-bit codes, float32.

  By the bits, one select for each: a vector unit does that faster than a gather.
  """
  found = [jnp.float32(x) for x in values]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    pairs = zip(found[1::2], found[::2], strict=True)
    found = [jnp.where(is_set, high, low) for high, low in pairs]
  return found[0]
