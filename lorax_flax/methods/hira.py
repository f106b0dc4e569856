"""HiRA (openreview TwJrTz9cRS): the kernel itself times a low-rank product."""

from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.parts import Parts, dense, full
from lorax_flax.methods.peft_form import TRANSPOSED, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class HiRA(MethodDelta):
  """W' = W + W ∘ (a @ b), the change formed.

  Attributes:
    a: (*stack, *in, r), float32, trained.
    b: (*stack, r, *out), float32, trained.
  """

  a: jax.Array
  b: jax.Array

  axes: ClassVar = {"a": ("stack", "in", "rank"), "b": ("stack", "rank", "out")}
  trained = ("a", "b")
  takes_init = True
  per_trial = ()
  peft = PeftForm(
    type="HIRA",
    keys={
      "linear": {"hira_A": ("a", TRANSPOSED), "hira_B": ("b", TRANSPOSED)},
      "embedding": {
        "hira_embedding_A": ("a", TRANSPOSED),
        "hira_embedding_B": ("b", TRANSPOSED),
      },
    },
    fields={
      "r": ("r", 32),
      "hira_dropout": ("lora_dropout", 0.0),
      "init_weights": ("init_lora_weights", True),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    # PEFT reads it, and makes every module of the rank r.
    off={"rank_pattern": ({},)},
  )

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """LoRA's factors, whose product is zero."""
    lora = LoRA.start(key, kernel, target, plan)
    return cls.of_target({"a": lora.a, "b": lora.b}, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, its change formed."""
    product = dense(
      self.laid_out("a", w.shape), self.laid_out("b", w.shape), jnp.float32
    )
    return full((w.astype(jnp.float32) * product)[..., None])

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32, where no 1 + a @ b is zero."""
    product = self.parts(jnp.ones_like(w)).a[..., 0]
    return w.astype(jnp.float32) / (1 + product)
