"""(IA)³ (arXiv 2205.05638): learnt scales of the outputs, or of the inputs."""

from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import by_role
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import Form, PeftForm
from lorax_flax.nodes import node

# PEFT's own defaults, by model type.
_OUTPUT = ("output.dense",)
_TARGETS = {
  **dict.fromkeys(("bert", "roberta"), ("key", "value", *_OUTPUT)),
  "deberta-v2": ("key_proj", "value_proj", *_OUTPUT),
  "gpt2": ("c_attn", "mlp.c_proj"),
  "t5": ("k", "v", "wo"),
  "mt5": ("k", "v", "wi_1"),
  **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
  **dict.fromkeys(
    ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
    ("q_proj", "v_proj", "down_proj"),
  ),
}
_FEEDFORWARD = {
  name: () if name == "mt5" else targets[-1:] for name, targets in _TARGETS.items()
}


@node
@dataclass(frozen=True)
class IA3(MethodDelta):
  """W' = W diag(l), and the base's own bias likewise; or diag(l) W.

  The option feedforward names the targets whose inputs are scaled, by the rules of
  `LoraConfig.targets`: the last kernel of each feed-forward block.

  Attributes:
    l: (*stack, *out), or (*stack, *in) of a feed-forward kernel; float32, trained;
      starts at one.
    feedforward: whether it scales the inputs.
    bias_name: the name, in the kernel's module, of the base's bias.
  """

  l: jax.Array
  feedforward: bool = field(default=False, metadata={"static": True})
  bias_name: str = field(default="bias", metadata={"static": True})

  axes: ClassVar = {"l": ("stack", "side")}
  trained = ("l",)
  per_trial = ()
  has_rank = False
  takes_tables = False
  scales_bias = True
  options: ClassVar = {"feedforward": ()}
  selections = ("feedforward",)
  peft = PeftForm(
    type="IA3",
    keys={
      "linear": {"ia3_l": ("l", Form(ones=(1,)))},
      "feedforward linear": {"ia3_l": ("l", Form(ones=(0,)))},
    },
    fields={"fan_in_fan_out": ("fan_in_fan_out", False)},
    lacks=("layers_to_transform", "layers_pattern"),
    options={"feedforward_modules": "feedforward"},
    training={"init_ia3_weights": True},
    targets=_TARGETS,
    selected={"feedforward": _FEEDFORWARD},
  )

  @classmethod
  def named_axes(cls, roles, sizes):
    axes = by_role(roles)
    return {**axes, "side": axes["in" if sizes["feedforward"] else "out"]}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """Ones."""
    del kernel
    draw = lambda _: {n: jnp.ones(s) for n, s in cls.layer_shapes(target).items()}
    return cls.of_target(cls.drawn(key, target, draw), target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel: nothing but a scale."""
    nothing = jnp.zeros((1,) * w.ndim + (0,))
    return Parts(nothing, nothing, self.laid_out("l", w.shape, fill=1.0))
