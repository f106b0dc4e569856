"""Q4_0 of GGUF files: 32 weights share a scale, of either sign."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.ggml import Ggml, halves, inverse, packed


@node
@dataclass(frozen=True)
class Q4_0(Ggml):
  """W = (codes - 8) * scales.

  Attributes:
    scales: float16, one a block.
  """

  scales: jax.Array

  parts: ClassVar = {"scales": (jnp.float16, 1), "codes": (jnp.uint8, 16)}
  axes: ClassVar = dict.fromkeys(parts, ("out", "in"))
  per_code: ClassVar[int] = 2
  block: ClassVar[int] = 32

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """The codes of the `gguf` package: the largest weight is -8 steps."""
    m = blocks.split(m, cls.block)
    at = jnp.abs(m).argmax(-1, keepdims=True)
    steps = jnp.take_along_axis(m, at, -1) / -8
    codes = jnp.clip(jnp.trunc(m * inverse(steps) + 8.5), 0, 15).astype(jnp.uint8)
    return cls(
      packed(blocks.join(codes), cls.block // 2),
      steps[..., 0].astype(jnp.float16),
      dtype=dtype,
    )

  def matrices(self) -> jax.Array:
    codes = halves(self.codes, self.block // 2).astype(jnp.float32) - 8
    steps = self.scales.astype(jnp.float32)[..., None]
    return blocks.join(blocks.split(codes, self.block) * steps).astype(self.dtype)
