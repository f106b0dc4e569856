"""LoRA with a bias on its second factor: x W' + scale * bias (PEFT's lora_bias)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.kernel_delta import Plan, Target
from lorax_flax.methods.lora import KEYS, LoRA
from lorax_flax.methods.low_rank import LowRank
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class BiasLoRA(LowRank):
  """LoRA with a bias. The other fields are those of `LowRank`.

  Attributes:
    bias: (*stack, *out), float32, trained; starts at zero, scaled as b is.
    bias_name: the name, in the kernel's module, of the base's bias, for merging.
  """

  bias: jax.Array = field(kw_only=True)
  bias_name: str = field(default="bias", kw_only=True, metadata={"static": True})

  axes: ClassVar = LowRank.axes | {"bias": ("stack", "out")}
  trained = ("a", "b", "bias")
  has_bias = True
  peft = PeftForm(
    "lora_bias",
    {
      kind: KEYS[kind] | {"lora_B.bias": ("bias", AS_IS)} for kind in ("linear", "conv")
    },
  )

  @classmethod
  def start(cls, key: jax.Array, kernel: Any, target: Target, plan: Plan) -> Self:
    """LoRA's factors, and no bias yet.

    Raises:
      LoraxError: the kernel is a table that is looked up.
    """
    if target.style == "embedding":
      raise LoraxError(
        f"lora_bias: target {target.path!r} is looked up, and takes no bias"
      )
    lora = LoRA.start(key, kernel, target, plan)
    stack = lora.a.shape[: target.roles.count("stack")]
    bias = jnp.zeros((*stack, *cls.layer_shapes(target)["bias"]))
    return cls(**vars(lora), bias=bias, bias_name=target.bias)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    bias = self.laid_out("bias", w.shape, value=self.scaled(self.bias))
    return Parts(*self.factors(w.shape), bias=bias)
