"""MiSS (arXiv 2409.15371, once Bone): outputs of inputs summed over strides."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import by_role
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class MiSS(MethodDelta):
  """W'[i] = W[i] + block[i mod r], for each input i.

  Attributes:
    block: (*stack, r, *out), float32, trained; starts at zero.
  """

  block: jax.Array

  axes: ClassVar = {"block": ("stack", "rank", "out")}
  trained = ("block",)
  per_trial = ()
  pads_rank = False
  takes_tables = False
  peft = PeftForm(
    type="MISS",
    keys={"linear": {"miss_block": ("block", AS_IS)}},
    fields={
      "r": ("r", 64),
      "miss_dropout": ("lora_dropout", 0.0),
      "bias": ("bias", "none"),
    },
    only="MiSS_only",
    off={"init_weights": (True, False)},
    training={"mini_r": 1},
  )

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    fan_in = math.prod(shape[i] for i in by_role(roles)["in"])
    if sizes["rank"] > fan_in:
      raise LoraxError(
        f"miss: rank {sizes['rank']} is above the {fan_in} inputs; choose {fan_in} or"
        " less"
      )
    return sizes

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """Zero, as PEFT starts it."""
    del kernel
    return cls.zeros(key, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel: one factor says which input goes into which sum."""
    block = self.laid_out("block", w.shape)
    rank = block.shape[-1]
    fan_in = math.prod(w.shape[i] for i in by_role(self.roles)["in"])
    sums = jax.nn.one_hot(jnp.arange(fan_in) % rank, rank)
    return Parts(self.placed(sums, ("in", "rank"), w.shape), block)
