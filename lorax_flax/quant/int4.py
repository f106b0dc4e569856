"""int4: symmetric, a scale for each block of 64 weights along the contracted axis."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.four_bit import FourBit


@node
@dataclass(frozen=True)
class Int4(FourBit):
  """W = (codes - 8) * absmax / 7, two codes in a byte.

  Attributes:
    absmax: (*stack, in / block, out) float32.
  """

  absmax: jax.Array

  axes: ClassVar = {"codes": ("out", "in"), "absmax": ("in", "out")}

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """Codes 1 to 15 that are rounded to the nearest, ties to even."""
    m = blocks.split(m, cls.block)
    absmax = blocks.absmax(m)
    codes = jnp.round(m * (7.0 * blocks.inverse(absmax))[..., None]) + 8
    codes = blocks.pack(blocks.join(codes.astype(jnp.uint8)))
    return cls(codes, absmax.mT, dtype=dtype)

  @staticmethod
  def values(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) - 8

  def steps(self) -> jax.Array:
    return self.absmax * (1 / 7)
