"""VeRA (arXiv 2310.11454): vectors trained beside random factors that all share."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import fans
from lorax_flax.methods.draws import Torch
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, TRANSPOSED, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class VeRA(MethodDelta):
  """W' = W + a diag(lambda_d) b diag(lambda_b).

  Attributes:
    lambda_d: (*stack, r), float32, trained.
    lambda_b: (*stack, *out), float32, trained; starts at zero.
    a: (*in, r), float32, the first rows of the projection of all targets.
    b: (r, *out), float32, the first columns likewise.
  """

  lambda_d: jax.Array
  lambda_b: jax.Array
  a: jax.Array
  b: jax.Array

  axes: ClassVar = {
    "lambda_d": ("stack", "rank"),
    "lambda_b": ("stack", "out"),
    "a": ("in", "rank"),
    "b": ("rank", "out"),
  }
  trained = ("lambda_d", "lambda_b")
  per_trial = ()
  options: ClassVar = {"d_initial": 0.1, "projection_prng_key": 0}
  pads_rank = False
  takes_tables = False
  peft = PeftForm(
    type="VERA",
    keys={
      "linear": {
        "vera_lambda_b": ("lambda_b", AS_IS),
        "vera_lambda_d": ("lambda_d", AS_IS),
      }
    },
    shared={"vera_A": ("a", TRANSPOSED), "vera_B": ("b", TRANSPOSED)},
    fields={
      "r": ("r", 256),
      "vera_dropout": ("lora_dropout", 0.0),
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    lacks=("exclude_modules",),
    options={"d_initial": "d_initial", "projection_prng_key": "projection_prng_key"},
    off={"save_projection": (True,)},
    training={"init_weights": True},
  )

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start, with its projections: those of torch by projection_prng_key."""
    del kernel
    shapes = cls.layer_shapes(target)
    sizes = [fans(each.shape, each.roles) for each in plan.targets]
    widest_in, widest_out = map(max, zip(*sizes, strict=True))
    stream = Torch(target.options["projection_prng_key"])
    first = stream.uniform((target.rank, widest_in), math.sqrt(6 / widest_in))
    second = stream.uniform((widest_out, target.rank), math.sqrt(6 / target.rank))
    fan_in, fan_out = fans(target.shape, target.roles)
    own = {"rank": target.rank}
    a, b = (cls.leaf_shape(n, target.shape, target.roles, own) for n in ("a", "b"))

    def draw(key):
      del key
      lambda_d = jnp.full(shapes["lambda_d"], target.options["d_initial"])
      return {"lambda_d": lambda_d, "lambda_b": jnp.zeros(shapes["lambda_b"])}

    leaves = cls.drawn(target.key(key), target, draw) | {
      "a": jnp.asarray(first[:, :fan_in].T.reshape(a)),
      "b": jnp.asarray(second[:fan_out].T.reshape(b)),
    }
    return cls.of_target(leaves, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel; both vectors are on b, so that layers share a."""
    a, b, lambda_d, lambda_b = (
      self.laid_out(n, w.shape) for n in ("a", "b", "lambda_d", "lambda_b")
    )
    return Parts(a, b * lambda_d * lambda_b)
