"""Kernels of 4-bit codes, two in a byte, in blocks of 64 that share a scale."""

from typing import ClassVar

import jax

from lorax_flax.quant import blocks
from lorax_flax.quant.quantized import Quantized


class FourBit(Quantized):
  """W = values(codes) * steps(); the base of these formats.

  The even weight of a pair along the contracted axis is in a byte's high bits.
  """

  per_code: ClassVar[int] = 2
  block: ClassVar[int] = 64

  @staticmethod
  def values(codes: jax.Array) -> jax.Array:
    """The numbers of codes from 0 to 15, float32."""
    raise NotImplementedError

  def steps(self) -> jax.Array:
    """The blocks' scales, (*stack, out, in / block) float32."""
    raise NotImplementedError

  def matrices(self) -> jax.Array:
    return blocks.unpacked(self.codes, self.values, self.steps(), self.dtype)
