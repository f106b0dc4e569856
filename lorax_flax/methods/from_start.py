"""LoRA whose factors start as a part of the kernel, which is taken off again."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import Shape, by_role
from lorax_flax.methods.kernel_delta import matrices
from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.low_rank import LowRank
from lorax_flax.nodes import node
from lorax_flax.quant import dense


@node
@dataclass(frozen=True)
class FromStart(LowRank):
  """W' = W + scale * (a @ b - start_a @ start_b); the other fields are `LowRank`'s.

  PEFT takes the start off the base's weights. Here the base stays as it is, and may be
  shared; PEFT's folder of it is the one that it converts: a LoRA of twice the rank.

  Attributes:
    start_a, start_b: as a and b, what they start with; not trained.
  """

  start_a: jax.Array = field(kw_only=True)
  start_b: jax.Array = field(kw_only=True)

  axes: ClassVar = LowRank.axes | {
    "start_a": LowRank.axes["a"],
    "start_b": LowRank.axes["b"],
  }
  per_trial = ("scale", "start_a", "start_b")
  takes_tables = False
  takes_init = False

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    axes = by_role(roles)
    least = min(math.prod(shape[i] for i in axes[role]) for role in ("in", "out"))
    if sizes["rank"] > least:
      raise LoraxError(
        f"{cls.__name__.lower()}: rank {sizes['rank']} is above the smaller side of a"
        f" kernel of shape {shape}: choose {least} or less"
      )
    return sizes

  @classmethod
  def of_matrices(
    cls, key: jax.Array, w: jax.Array, scale: jax.Array, target
  ) -> tuple[jax.Array, jax.Array]:
    """The start of kernels w, (*stack, in, out): (*stack, in, r) and (*stack, r, out).

    Args:
      scale: broadcasts to w; what their product is multiplied with.
      target: its rank and options.
    """
    raise NotImplementedError

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """The factors of the kernel's own, whose change is zero.

    Raises:
      LoraxError: dropout, which would drop what is taken off too.
    """
    if plan.dropout:
      raise LoraxError(
        f"{target.method} has no dropout, not {plan.dropout}: leave it out"
      )
    w = matrices(dense(kernel), target.roles, target.layers)
    scale = jnp.asarray(target.scale, jnp.float32)
    scale = scale.reshape(scale.shape + (1,) * (w.ndim - scale.ndim))
    first, second = cls.of_matrices(target.key(key), w, scale, target)
    shapes, stack = cls.layer_shapes(target), w.shape[:-2]
    factors = {
      "a": first.reshape((*stack, *shapes["a"])),
      "b": second.reshape((*stack, *shapes["b"])),
    }
    factors = cls.within_ranks(factors, target)
    starts = {f"start_{name}": x for name, x in factors.items()}
    return cls.of_target(factors | starts, target, plan)

  def factors(self, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """(a - start_a) b + start_a (b - start_b), of rank 2r: zero at the start."""
    a, b = super().factors(shape)
    start_a = self.laid_out("start_a", shape)
    start_b = self.laid_out("start_b", shape, value=self.scaled(self.start_b))
    return (
      jnp.concatenate([a - start_a, start_a], axis=-1),
      jnp.concatenate([b, b - start_b], axis=-1),
    )

  def in_peft(self) -> LoRA:
    """The LoRA of twice the rank that PEFT converts such an adapter to."""
    a = jnp.concatenate([self.a, self.start_a], axis=-1)
    b = jnp.concatenate([self.b, -self.start_b], axis=self.roles.count("stack"))
    return LoRA(a, b, self.scale, self.roles, self.dropout, self.layers)
