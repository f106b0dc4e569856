"""Kernels of 4-bit codes, two in a byte, in blocks of 64 that share a scale."""

from typing import ClassVar

import jax

from lorax_flax.quant import blocks
from lorax_flax.quant.quantized import Quantized


class FourBit(Quantized):
  """W = values(codes) * steps(); the base of these formats.

  The even weight of a pair along the contracted axis is in a byte's high bits. The
  blocks' scales are stored with the outputs last: a TPU pads the last axis of an array
  to 128, and there may be 64 blocks.
  """

  per_code: ClassVar[int] = 2
  block: ClassVar[int] = 64

  @staticmethod
  def values(codes: jax.Array) -> jax.Array:
    """The numbers of codes from 0 to 15, float32."""
    raise NotImplementedError

  def steps(self) -> jax.Array:
    """The blocks' scales, (*stack, in / block, out) float32."""
    raise NotImplementedError

  def matrices(self) -> jax.Array:
    steps = self.steps().mT
    return blocks.unpacked(self.codes, self.values, steps, self.dtype)
