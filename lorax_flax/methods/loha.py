"""LoHa (arXiv 2108.06098): the Hadamard product of two low-rank products."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.draws import uniform
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import TRANSPOSED, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class LoHa(MethodDelta):
  """W' = W + scale * (w1_in @ w1_out) ∘ (w2_in @ w2_out).

  Attributes:
    w1_in, w2_in: (*stack, *in, r), float32, trained.
    w1_out, w2_out: (*stack, r, *out), float32, trained.
    scale: () or (*stack,), alpha / r.
  """

  w1_in: jax.Array
  w1_out: jax.Array
  w2_in: jax.Array
  w2_out: jax.Array
  scale: jax.Array

  axes: ClassVar = {
    **dict.fromkeys(("w1_in", "w2_in"), ("stack", "in", "rank")),
    **dict.fromkeys(("w1_out", "w2_out"), ("stack", "rank", "out")),
    "scale": ("stack",),
  }
  trained = ("w1_in", "w1_out", "w2_in", "w2_out")
  takes_tables = False
  peft = PeftForm(
    type="LOHA",
    keys={
      "linear": {
        "hada_w1_a": ("w1_out", TRANSPOSED),
        "hada_w1_b": ("w1_in", TRANSPOSED),
        "hada_w2_a": ("w2_out", TRANSPOSED),
        "hada_w2_b": ("w2_in", TRANSPOSED),
      }
    },
    fields={
      "r": ("r", 8),
      "alpha": ("lora_alpha", 8),
      "rank_pattern": ("rank_pattern", {}),
      "alpha_pattern": ("alpha_pattern", {}),
    },
    # Of convolutions alone, which have no form here.
    training={
      "use_effective_conv2d": False,
      "rank_dropout": 0.0,
      "module_dropout": 0.0,
      "init_weights": True,
    },
  )

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start: all uniform but w2_in, which is zero."""
    del kernel
    shapes = cls.layer_shapes(target)
    fans = {
      "w1_in": math.prod(shapes["w1_in"][:-1]),
      "w1_out": target.rank,
      "w2_out": target.rank,
    }

    def draw(key):
      keys = jax.random.split(key, len(fans))
      leaves = {
        n: uniform(k, shapes[n], fans[n]) for n, k in zip(fans, keys, strict=True)
      }
      return leaves | {"w2_in": jnp.zeros(shapes["w2_in"])}

    return cls.of_target(cls.drawn(target.key(key), target, draw), target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, of rank r²: (Σ_i a_i b_i) ∘ (Σ_j c_j d_j) is
    Σ_ij (a_i ∘ c_j) (b_i ∘ d_j)."""
    w1_in, w1_out, w2_in, w2_out = (self.laid_out(n, w.shape) for n in self.trained)
    scale = self.laid_out("scale", w.shape)
    return Parts(_pairs(w1_in, w2_in), scale * _pairs(w1_out, w2_out))


def _pairs(x: jax.Array, y: jax.Array) -> jax.Array:
  """Every product of a column of one with a column of the other, (…, r²)."""
  return (x[..., :, None] * y[..., None, :]).reshape(*x.shape[:-1], -1)
