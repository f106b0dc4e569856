"""LoKr (arXiv 2309.14859): a Kronecker product, its larger factor of a low rank."""

import math
from dataclasses import dataclass, field
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
class LoKr(MethodDelta):
  """W' = W + scale * (w1 ⊗ (w2_out @ w2_in))ᵀ.

  The outputs are l k and the inputs m n, each split as evenly as it goes, or by the
  option decompose_factor. PEFT has the larger factor whole where the rank is not below
  a half of its larger side, and both of a low rank with decompose_both: neither is
  built.

  Attributes:
    w1: (*stack, l, m), float32, trained; starts at zero.
    w2_out: (*stack, k, r), float32, trained.
    w2_in: (*stack, r, n), float32, trained.
    scale: () or (*stack,), alpha / r.
  """

  w1: jax.Array
  w2_out: jax.Array
  w2_in: jax.Array
  scale: jax.Array
  decompose_factor: int = field(default=-1, metadata={"static": True})

  axes: ClassVar = {
    "w1": ("stack", "l", "m"),
    "w2_out": ("stack", "k", "rank"),
    "w2_in": ("stack", "rank", "n"),
    "scale": ("stack",),
  }
  trained = ("w1", "w2_out", "w2_in")
  takes_tables = False
  options: ClassVar = {"decompose_factor": -1}
  peft = PeftForm(
    type="LOKR",
    keys={
      "linear": {
        "lokr_w1": ("w1", AS_IS),
        "lokr_w2_a": ("w2_out", AS_IS),
        "lokr_w2_b": ("w2_in", AS_IS),
      }
    },
    fields={
      "r": ("r", 8),
      "alpha": ("lora_alpha", 8),
      "rank_pattern": ("rank_pattern", {}),
      "alpha_pattern": ("alpha_pattern", {}),
    },
    options={"decompose_factor": "decompose_factor"},
    off={"decompose_both": (False,)},
    # The first is of convolutions alone, which have no form here.
    training={
      "use_effective_conv2d": False,
      "rank_dropout": 0.0,
      "module_dropout": 0.0,
      "rank_dropout_scale": False,
      "init_weights": True,
    },
  )

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    axes, rank = by_role(roles), sizes["rank"]
    fans = {r: math.prod(shape[i] for i in axes[r]) for r in ("in", "out")}
    (m, n), (l, k) = (_split(size, sizes["decompose_factor"]) for size in fans.values())
    if 2 * rank >= max(k, n):
      least = (max(k, n) - 1) // 2
      choice = f"choose {least} or less" if least else "another decompose_factor may do"
      raise LoraxError(
        f"lokr: rank {rank} of the factor of shape ({k}, {n}) of a kernel of shape"
        f" {shape} is not below half of its larger side, and PEFT has it whole then,"
        f" which is not built: {choice}"
      )
    return {**sizes, "l": l, "m": m, "k": k, "n": n}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start: w1 zero, the others uniform."""
    del kernel
    shapes = cls.layer_shapes(target)

    def draw(key):
      keys = jax.random.split(key)
      leaves = {
        n: uniform(k, shapes[n], shapes[n][-1])
        for n, k in zip(("w2_out", "w2_in"), keys, strict=True)
      }
      return leaves | {"w1": jnp.zeros(shapes["w1"])}

    return cls.of_target(cls.drawn(target.key(key), target, draw), target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, of rank m r: one for each row of w1."""
    *stack, _, m = self.w1.shape
    n, rank = self.w2_in.shape[-1], self.rank
    a = jnp.einsum("...rn,mi->...mnir", self.w2_in, jnp.eye(m))
    b = jnp.einsum("...li,...kr->...irlk", self.w1, self.w2_out)
    a = a.reshape((*stack, m * n, m * rank))
    b = b.reshape((*stack, m * rank, -1))
    return Parts(
      self.placed(a, ("stack", "in", "rank"), w.shape),
      self.placed(b, ("stack", "rank", "out"), w.shape)
      * self.laid_out("scale", w.shape),
    )


def _split(size: int, factor: int) -> tuple[int, int]:
  """PEFT's two factors of a size, the smaller first unless `factor` divides it."""
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  most = size if factor == -1 else factor
  small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= most]
  return (small or [1])[-1], size // (small or [1])[-1]
