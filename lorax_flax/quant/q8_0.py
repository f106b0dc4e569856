"""Q8_0 of GGUF files: 32 weights share a scale."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.ggml import Ggml, inverse


@node
@dataclass(frozen=True)
class Q8_0(Ggml):
  """W = codes * scales, int8.

  Attributes:
    scales: float16, one a block.
  """

  scales: jax.Array

  parts: ClassVar = {"scales": (jnp.float16, 1), "codes": (jnp.int8, 32)}
  axes: ClassVar = dict.fromkeys(parts, ("out", "in"))
  block: ClassVar[int] = 32

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """The codes of the `gguf` package: rounded to the nearest, ties from zero."""
    m = blocks.split(m, cls.block)
    steps = blocks.absmax(m) / 127
    scaled = m * inverse(steps)[..., None]
    size = jnp.abs(scaled)
    low = jnp.floor(size)
    codes = jnp.sign(scaled) * (low + jnp.floor(2 * (size - low)))
    return cls(
      blocks.join(codes.astype(jnp.int8)), steps.astype(jnp.float16), dtype=dtype
    )

  def matrices(self) -> jax.Array:
    codes = blocks.split(self.codes.astype(jnp.float32), self.block)
    steps = self.scales.astype(jnp.float32)[..., None]
    return blocks.join(codes * steps).astype(self.dtype)
