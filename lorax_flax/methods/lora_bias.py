"""LoRA with a bias on its second factor: x W' + scale * bias (PEFT's lora_bias)."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.low_rank import LowRank, Parts, axes_of, sizes_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BiasLoRA(LowRank):
  """LoRA with a bias. The other fields are those of `LowRank`.

  Attributes:
    bias: (*stack, *out), float32, trained; starts at zero, scaled as b is.
  """

  bias: jax.Array = field(kw_only=True)

  trained: ClassVar[tuple[str, ...]] = ("a", "b", "bias")

  def parts(self, w: jax.Array) -> Parts:
    """What the method makes of the kernel w, unevaluated."""
    bias = self.per_out(self._scaled_bias(), w.shape, 0.0)
    return Parts(*self.factors(w.shape), bias=bias)

  def bias_delta(self, shape: tuple[int, ...]) -> jax.Array:
    """What is added to the base's own bias, (*stack, *out), for a kernel of `shape`."""
    return self.in_all_layers(self._scaled_bias(), shape)

  def _scaled_bias(self) -> jax.Array:
    ones = (1,) * (self.bias.ndim - self.scale.ndim)
    return self.bias * self.scale.reshape(self.scale.shape + ones)


def init(shape: tuple[int, ...], lora: LoRA) -> BiasLoRA:
  """The starting delta: `lora`'s factors, and no bias yet."""
  stack = lora.a.shape[: len(axes_of(lora.roles, "stack"))]
  bias = jnp.zeros((*stack, *sizes_of(shape, lora.roles, "out")))
  return BiasLoRA(
    lora.a, lora.b, lora.scale, lora.roles, lora.dropout, lora.layers, bias=bias
  )
