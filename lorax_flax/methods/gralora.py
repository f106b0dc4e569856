"""GraLoRA (arXiv 2505.20355): a grid of blocks, each of a low rank of its own."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import by_role
from lorax_flax.methods.draws import uniform
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class GraLoRA(MethodDelta):
  """W' = W + scale * D, D of k x k blocks.

  Block (n, j) of D, inputs n and outputs j, is a[n][:, slice j] @ b[j][slice n], where
  the rank has k slices.

  Attributes:
    a: (*stack, k, in / k, r), float32, trained.
    b: (*stack, k, r, out / k), float32, trained; starts at zero.
    scale: () or (*stack,), alpha / r.
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array

  axes: ClassVar = {
    "a": ("stack", "k", "in_block", "rank"),
    "b": ("stack", "k", "rank", "out_block"),
    "scale": ("stack",),
  }
  trained = ("a", "b")
  pads_rank = False
  takes_tables = False
  options: ClassVar = {"k": 2}
  peft = PeftForm(
    type="GRALORA",
    keys={"linear": {"gralora_A": ("a", AS_IS), "gralora_B": ("b", AS_IS)}},
    fields={
      "r": ("r", 32),
      "alpha": ("lora_alpha", 64),
      "gralora_dropout": ("lora_dropout", 0.0),
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    lacks=("exclude_modules",),
    options={"gralora_k": "k"},
    off={"hybrid_r": (0,)},
    training={"init_weights": True},
  )

  @property
  def k(self) -> int:
    return self.a.shape[-3]

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    axes, k, found = by_role(roles), sizes["k"], dict(sizes)
    fans = {r: math.prod(shape[i] for i in axes[r]) for r in ("in", "out")}
    for name, size in {**fans, "rank": sizes["rank"]}.items():
      if k < 1 or size % k:
        raise LoraxError(
          f"gralora: k={k} does not divide {name}={size} of a kernel of shape {shape}"
        )
    return found | {f"{role}_block": size // k for role, size in fans.items()}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start: a uniform, b zero."""
    del kernel
    shapes = cls.layer_shapes(target)
    fan_in = shapes["a"][-2]

    def draw(key):
      return {"a": uniform(key, shapes["a"], fan_in), "b": jnp.zeros(shapes["b"])}

    return cls.of_target(cls.drawn(target.key(key), target, draw), target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, of rank k r: a rank for each slice of each block."""
    *stack, k, _, rank = self.a.shape
    a = self.a.reshape((*stack, k, -1, k, rank // k))
    b = self.b.reshape((*stack, k, k, rank // k, self.b.shape[-1]))
    own = jnp.eye(k)
    a = jnp.einsum("...nijq,nm->...nijmq", a, own)
    b = jnp.einsum("...jmqo,jk->...jmqko", b, own)
    a = a.reshape((*stack, -1, k * rank))
    b = b.reshape((*stack, k * rank, -1))
    return Parts(
      self.placed(a, ("stack", "in", "rank"), w.shape),
      self.placed(b, ("stack", "rank", "out"), w.shape)
      * self.laid_out("scale", w.shape),
    )
