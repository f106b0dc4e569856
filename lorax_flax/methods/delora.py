"""DeLoRA (arXiv 2503.18225): a low-rank change whose norm is learnt apart from it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import by_role
from lorax_flax.methods.draws import uniform
from lorax_flax.methods.kernel_delta import MethodDelta, matrices
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, TRANSPOSED, Form, PeftForm
from lorax_flax.nodes import node
from lorax_flax.quant import dense

# The least norm of a column of a, or of a row of b, that is divided by.
_LEAST = 1e-4


@node
@dataclass(frozen=True)
class DeLoRA(MethodDelta):
  """W' = W + diag(norms) a diag(bound / (r |a_j| |b_j|)) b.

  Attributes:
    a: (*stack, *in, r), float32, trained; column j is a_j. A column of zeros is none.
    b: (*stack, r, *out), float32, trained; row j is b_j; starts at zero.
    bound: (*stack,), float32, trained; the most that the change's norm can be, in units
      of the kernel's. It starts at the option delora_lambda.
    norms: (*stack, *in), float32: of the kernel's rows, over the outputs, at the start.
  """

  a: jax.Array
  b: jax.Array
  bound: jax.Array
  norms: jax.Array

  axes: ClassVar = {
    "a": ("stack", "in", "rank"),
    "b": ("stack", "rank", "out"),
    "bound": ("stack",),
    "norms": ("stack", "in"),
  }
  trained = ("a", "b", "bound")
  per_trial = ()
  takes_tables = False
  options: ClassVar = {"delora_lambda": 15.0}
  peft = PeftForm(
    type="DELORA",
    keys={
      "linear": {
        "delora_A": ("a", TRANSPOSED),
        "delora_B": ("b", TRANSPOSED),
        "delora_lambda": ("bound", Form(ones=(0,))),
        "delora_w_norm": ("norms", AS_IS),
      }
    },
    fields={
      "r": ("r", 8),
      "module_dropout": ("lora_dropout", 0.0),
      "bias": ("bias", "none"),
      "rank_pattern": ("rank_pattern", {}),
    },
    options={"delora_lambda": "delora_lambda"},
    off={"lambda_pattern": ({},)},
    training={"init_weights": True},
  )

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """LoRA's uniform a, and b zero."""
    shapes = cls.layer_shapes(target)
    fan_in = math.prod(shapes["a"][:-1])

    def draw(key):
      return {
        "a": uniform(key, shapes["a"], fan_in),
        "b": jnp.zeros(shapes["b"]),
        "bound": jnp.full(shapes["bound"], target.options["delora_lambda"]),
      }

    leaves = cls.drawn(target.key(key), target, draw)
    w = matrices(dense(kernel), target.roles, target.layers)
    norms = jnp.sqrt(jnp.square(w).sum(-1))
    shape = (*w.shape[:-2], *shapes["a"][:-1])
    return cls.of_target(leaves | {"norms": norms.reshape(shape)}, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    a, b, bound, norms = (
      self.laid_out(n, w.shape) for n in ("a", "b", "bound", "norms")
    )
    across = lambda role: by_role(self.roles)[role]
    size_a, size_b = _squares(a, across("in")), _squares(b, across("out"))
    used = (size_a > 0).astype(jnp.float32)
    rank = jnp.maximum(used.sum(-1, keepdims=True), 1)
    return Parts(norms * a, bound / (rank * _norm(size_a) * _norm(size_b)) * b)


def _squares(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.square(x).sum(axes, keepdims=True)


def _norm(squares: jax.Array) -> jax.Array:
  """The norm, at least _LEAST and without a slope below it."""
  return jnp.sqrt(jnp.maximum(squares, _LEAST**2))
