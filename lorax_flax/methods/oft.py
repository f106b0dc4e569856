"""OFT (arXiv 2306.07280; on the inputs, 2506.19847): rotated blocks of inputs."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods import rotation
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class OFT(MethodDelta):
  """W' = blk(R) W, R a Cayley transform, or the first terms of its Neumann series.

  Attributes:
    upper: (*stack, in / n, n (n - 1) / 2), float32, trained; the upper triangle of each
      block's skew-symmetric Q, row by row; starts at zero. n is the option block_size.
    use_cayley_neumann: whether R is I + 2Q + 2Q² + … + Q^(t - 1), t the next option.
    num_cayley_neumann_terms: t.
  """

  upper: jax.Array
  use_cayley_neumann: bool = field(default=True, metadata={"static": True})
  num_cayley_neumann_terms: int = field(default=5, metadata={"static": True})

  axes: ClassVar = {"upper": ("stack", "blocks", "triangle")}
  trained = ("upper",)
  per_trial = ()
  has_rank = False
  takes_tables = False
  options: ClassVar = {
    "block_size": 32,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
  }
  peft = PeftForm(
    type="OFT",
    since="0.18.0",
    keys={"linear": {"oft_R.weight": ("upper", AS_IS)}},
    fields={
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    options={
      "oft_block_size": "block_size",
      "use_cayley_neumann": "use_cayley_neumann",
      "num_cayley_neumann_terms": "num_cayley_neumann_terms",
    },
    off={"r": (0,), "coft": (False,), "block_share": (False,)},
    training={"eps": 6e-5, "module_dropout": 0.0, "init_weights": True},
  )

  @property
  def block_size(self) -> int:
    return (1 + math.isqrt(1 + 8 * self.upper.shape[-1])) // 2

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    n = sizes["block_size"]
    return rotation.block_sizes(shape, roles, sizes) | {"triangle": n * (n - 1) // 2}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """Zero: no rotation."""
    del kernel
    return cls.zeros(key, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    return Parts(*rotation.factors(self, self._rotation(), w))

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32."""
    return rotation.rotated_back(self, self._rotation(), w)

  def _rotation(self) -> jax.Array:
    """R, (*stack, blocks, n, n)."""
    n = self.block_size
    rows, columns = jnp.triu_indices(n, 1)
    q = jnp.zeros((*self.upper.shape[:-1], n, n))
    q = q.at[..., rows, columns].set(self.upper)
    q = q - jnp.swapaxes(q, -1, -2)
    if not self.use_cayley_neumann:
      return rotation.cayley(q)
    terms = self.num_cayley_neumann_terms
    found = power = rotation.identity(q)
    for i in range(1, terms):
      power = power @ q
      found = found + (power if i == terms - 1 else 2 * power)
    return found
