"""Q6_K of GGUF files: 256 weights of 6 bits, sixteen scales of 8 bits."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.ggml import Ggml, halves


@node
@dataclass(frozen=True)
class Q6_K(Ggml):
  """W = (code - 32) * (scale * step), 16 weights a scale.

  Attributes:
    high: uint8, 64 a block: the two high bits of four codes in a byte.
    scales: int8, sixteen a block.
    steps: float16, one a block; of the scales.
  """

  high: jax.Array
  scales: jax.Array
  steps: jax.Array

  parts: ClassVar = {
    "codes": (jnp.uint8, 128),
    "high": (jnp.uint8, 64),
    "scales": (jnp.int8, 16),
    "steps": (jnp.float16, 1),
  }
  axes: ClassVar = dict.fromkeys(parts, ("out", "in"))
  per_code: ClassVar[int] = 2
  block: ClassVar[int] = 256

  def matrices(self) -> jax.Array:
    high = blocks.split(self.high, 32)
    high = jnp.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -2)
    codes = halves(self.codes, 64) | (blocks.join(blocks.join(high)) << 4)
    steps = self.steps.astype(jnp.float32)[..., None]
    steps = blocks.join(steps * blocks.split(self.scales, 16).astype(jnp.float32))
    w = blocks.split(codes.astype(jnp.float32) - 32, 16) * steps[..., None]
    return blocks.join(w).astype(self.dtype)
