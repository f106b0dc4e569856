"""Q4_1 of GGUF files: 32 weights share a scale and a minimum."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.ggml import Ggml, halves, inverse, packed


@node
@dataclass(frozen=True)
class Q4_1(Ggml):
  """W = codes * scales + minima.

  Attributes:
    scales: float16, one a block.
    minima: float16, one a block.
  """

  scales: jax.Array
  minima: jax.Array

  parts: ClassVar = {
    "scales": (jnp.float16, 1),
    "minima": (jnp.float16, 1),
    "codes": (jnp.uint8, 16),
  }
  axes: ClassVar = dict.fromkeys(parts, ("out", "in"))
  per_code: ClassVar[int] = 2
  block: ClassVar[int] = 32

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """The codes of the `gguf` package: from the least weight to the largest."""
    m = blocks.split(m, cls.block)
    low = m.min(-1, keepdims=True)
    steps = (m.max(-1, keepdims=True) - low) / 15
    codes = jnp.trunc((m - low) * inverse(steps) + 0.5)
    return cls(
      packed(blocks.join(jnp.clip(codes, 0, 15).astype(jnp.uint8)), cls.block // 2),
      steps[..., 0].astype(jnp.float16),
      low[..., 0].astype(jnp.float16),
      dtype=dtype,
    )

  def matrices(self) -> jax.Array:
    codes = halves(self.codes, self.block // 2).astype(jnp.float32)
    steps, low = (x.astype(jnp.float32)[..., None] for x in (self.scales, self.minima))
    w = blocks.split(codes, self.block) * steps + low
    return blocks.join(w).astype(self.dtype)
