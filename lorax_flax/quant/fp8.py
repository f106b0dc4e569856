"""fp8: floats of 8 bits (e4m3, arXiv 2209.05433), a scale for each output."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.quantized import Quantized

_LARGEST = 448.0  # of e4m3


@node
@dataclass(frozen=True)
class Fp8(Quantized):
  """W = codes * absmax / 448.

  Attributes:
    absmax: (*stack, out) float32.
  """

  absmax: jax.Array

  axes: ClassVar = {"codes": ("out", "in"), "absmax": ("out",)}

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """Codes that are rounded to the nearest, ties to even."""
    absmax = blocks.absmax(m)
    scaled = m * (_LARGEST * blocks.inverse(absmax))[..., None]
    # The product with a rounded inverse may be beyond the largest, which is no number.
    codes = jnp.clip(scaled, -_LARGEST, _LARGEST).astype(jnp.float8_e4m3fn)
    return cls(codes, absmax, dtype=dtype)

  def matrices(self) -> jax.Array:
    steps = (self.absmax * (1 / _LARGEST))[..., None]
    return (self.codes.astype(jnp.float32) * steps).astype(self.dtype)
