"""HRA (arXiv 2405.17484): a chain of Householder reflections of the inputs."""

from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.draws import uniform
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts, product
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class HRA(MethodDelta):
  """W' = H_r … H_1 W with H_i = I - 2 û_i û_iᵀ on the inputs.

  The chain is I - û T ûᵀ (the compact WY form), so the change is of rank r: neither a
  rotation of the inputs' size nor W' is formed.

  Attributes:
    u: (*stack, *in, r), float32, trained; column i is u_i. A column of zeros is none.
  """

  u: jax.Array

  axes: ClassVar = {"u": ("stack", "in", "rank")}
  trained = ("u",)
  per_trial = ()
  takes_tables = False
  peft = PeftForm(
    type="HRA",
    keys={"linear": {"hra_u": ("u", AS_IS)}},
    fields={"r": ("r", 8), "bias": ("bias", "none")},
    off={"apply_GS": (False,)},
    training={"init_weights": True},
  )

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start: neighbours are equal, and cancel.

    Raises:
      LoraxError: an odd rank, with which it would not start at the base.
    """
    del kernel
    if odd := [rank for rank in target.ranks or (target.rank,) if rank % 2]:
      raise LoraxError(
        f"hra starts at the base with an even rank, not {odd[0]} at {target.path!r}: "
        f"choose {odd[0] + 1}"
      )
    (shape,) = cls.layer_shapes(target).values()

    def draw(key):
      # torch's fan of (in, r / 2).
      half = uniform(key, (*shape[:-1], target.rank // 2), target.rank // 2)
      return {"u": jnp.repeat(half, 2, axis=-1)}

    return cls.of_target(cls.drawn(target.key(key), target, draw), target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel; its second factor is made of W's projection on u."""
    u, inner = self._reflections()
    b = _solve(jnp.swapaxes(inner, -1, -2), u, self.matrices(w), lower=True)
    a = self.placed(u, ("stack", "in", "rank"), w.shape)
    return Parts(a, self.placed(-b, ("stack", "rank", "out"), w.shape))

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32: the chain the other way round."""
    u, inner = self._reflections()
    back = u @ _solve(inner, u, self.matrices(w), lower=False)
    delta = self.placed(-back, ("stack", "in", "out"), w.shape)[..., 0]
    return w.astype(jnp.float32) + delta

  def _reflections(self) -> tuple[jax.Array, jax.Array]:
    """û, (*stack, in, r), and T⁻¹, (*stack, r, r): ½ and, above it, ûᵀû."""
    u = self.columns("u")
    square = jnp.sum(u * u, axis=-2, keepdims=True)
    u = jnp.where(square > 0, u * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    inner = jnp.triu(product(jnp.swapaxes(u, -1, -2), u), 1)
    return u, inner + jnp.broadcast_to(jnp.eye(u.shape[-1]) / 2, inner.shape)


def _solve(triangle: jax.Array, u: jax.Array, w: jax.Array, lower: bool) -> jax.Array:
  """triangle⁻¹ uᵀ w, (*stack, r, out)."""
  projected = product(jnp.swapaxes(u, -1, -2), w)
  return jax.scipy.linalg.solve_triangular(triangle, projected, lower=lower)
