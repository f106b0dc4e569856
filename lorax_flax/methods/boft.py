"""BOFT (arXiv 2311.06243) of one factor: rotated blocks of inputs, scaled outputs."""

from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods import rotation
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import Form, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class BOFT(MethodDelta):
  """W' = blk(Q) W diag(s), Q = (I + S)(I - S)⁻¹ and S = (R - Rᵀ) / 2.

  Attributes:
    blocks: R, (*stack, in / n, n, n), float32, trained; starts at zero. n is the option
      block_size.
    scales_out: s, (*stack, *out), float32, trained; starts at one.
  """

  blocks: jax.Array
  scales_out: jax.Array

  axes: ClassVar = {
    "blocks": ("stack", "blocks", "block_size", "block_columns"),
    "scales_out": ("stack", "out"),
  }
  trained = ("blocks", "scales_out")
  per_trial = ()
  has_rank = False
  takes_tables = False
  options: ClassVar = {"block_size": 4}
  peft = PeftForm(
    type="BOFT",
    keys={
      "linear": {
        "boft_R": ("blocks", Form(ones=(0,))),
        "boft_s": ("scales_out", Form(ones=(1,))),
      }
    },
    fields={
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    options={"boft_block_size": "block_size"},
    off={"boft_block_num": (0,), "boft_n_butterfly_factor": (1,)},
    training={"boft_dropout": 0.0, "init_weights": True},
  )

  @property
  def block_size(self) -> int:
    return self.blocks.shape[-1]

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    found = rotation.block_sizes(shape, roles, sizes)
    return found | {"block_columns": sizes["block_size"]}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """No rotation, and outputs as they are."""
    del kernel
    shapes = cls.layer_shapes(target)

    def draw(key):
      del key
      ones = jnp.ones(shapes["scales_out"])
      return {"blocks": jnp.zeros(shapes["blocks"]), "scales_out": ones}

    return cls.of_target(cls.drawn(key, target, draw), target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    scales = self.laid_out("scales_out", w.shape, fill=1.0)
    return Parts(*rotation.factors(self, self._rotation(), w), out_scale=scales)

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32, where no scale is zero."""
    scales = self.laid_out("scales_out", w.shape, fill=1.0)[..., 0]
    return rotation.rotated_back(self, self._rotation(), w.astype(jnp.float32) / scales)

  def _rotation(self) -> jax.Array:
    """The rotation of rows, (*stack, blocks, n, n)."""
    skew = (self.blocks - jnp.swapaxes(self.blocks, -1, -2)) / 2
    return rotation.cayley(skew)
