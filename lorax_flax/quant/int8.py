"""int8: a scale for each output (bitsandbytes' LLM.int8 weights, arXiv 2208.07339)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.quantized import Quantized


@node
@dataclass(frozen=True)
class Int8(Quantized):
  """W = codes * absmax / 127.

  Attributes:
    absmax: (*stack, out) float32.
  """

  absmax: jax.Array

  axes: ClassVar = {"codes": ("out", "in"), "absmax": ("out",)}

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """Codes that are rounded to the nearest, ties to even."""
    absmax = blocks.absmax(m)
    codes = jnp.round(m * (127.0 * blocks.inverse(absmax))[..., None])
    return cls(codes.astype(jnp.int8), absmax, dtype=dtype)

  def matrices(self) -> jax.Array:
    steps = (self.absmax * (1 / 127))[..., None]
    return (self.codes.astype(jnp.float32) * steps).astype(self.dtype)
