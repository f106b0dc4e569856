"""Q4_K of GGUF files: 256 weights, eight scales and minima of 6 bits."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.ggml import Ggml, halves


@node
@dataclass(frozen=True)
class Q4_K(Ggml):
  """W = codes * (scale * step) - minimum * low_step, 32 weights a scale.

  Attributes:
    steps: float16, one a block; of the scales.
    low_steps: float16, one a block; of the minima.
    scales: uint8, twelve a block: eight scales and eight minima.
  """

  steps: jax.Array
  low_steps: jax.Array
  scales: jax.Array

  parts: ClassVar = {
    "steps": (jnp.float16, 1),
    "low_steps": (jnp.float16, 1),
    "scales": (jnp.uint8, 12),
    "codes": (jnp.uint8, 128),
  }
  axes: ClassVar = dict.fromkeys(parts, ("out", "in"))
  per_code: ClassVar[int] = 2
  block: ClassVar[int] = 256

  def matrices(self) -> jax.Array:
    # Six bits of a scale and of a minimum are in three bytes; of the second four, two
    # bits are in the high bits of the first.
    first, second, third = jnp.split(blocks.split(self.scales, 12), 3, -1)
    high = lambda x: (x >> 2) & 0x30
    scales = jnp.concatenate([first & 63, (third & 15) | high(first)], -1)
    minima = jnp.concatenate([second & 63, (third >> 4) | high(second)], -1)
    steps, low = (
      blocks.join(x.astype(jnp.float32)[..., None] * n.astype(jnp.float32))[..., None]
      for x, n in ((self.steps, scales), (self.low_steps, minima))
    )
    codes = blocks.split(halves(self.codes, 32).astype(jnp.float32), 32)
    return blocks.join(codes * steps - low).astype(self.dtype)
