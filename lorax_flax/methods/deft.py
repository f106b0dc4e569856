"""DEFT, of PEFT: part of what some directions of the outputs get, learnt anew."""

from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.kernel_delta import MethodDelta, matrices
from lorax_flax.methods.parts import Parts, product
from lorax_flax.methods.peft_form import AS_IS, TRANSPOSED, PeftForm
from lorax_flax.nodes import node
from lorax_flax.quant import dense

_STD = 0.02  # of p at the start


@node
@dataclass(frozen=True)
class DEFT(MethodDelta):
  """W' = W + (injected - W relu(p)) pᵀ, PEFT's decomposition "relu".

  Attributes:
    p: (*stack, *out, r), float32, trained.
    injected: (*stack, *in, r), float32, trained; starts as W relu(p).
  """

  p: jax.Array
  injected: jax.Array

  axes: ClassVar = {
    "p": ("stack", "out", "rank"),
    "injected": ("stack", "in", "rank"),
  }
  trained = ("p", "injected")
  per_trial = ()
  takes_tables = False
  peft = PeftForm(
    type="DEFT",
    keys={"linear": {"deft_P": ("p", AS_IS), "deft_R": ("injected", TRANSPOSED)}},
    fields={
      "r": ("r", 8),
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    off={
      "decomposition_method": ("relu",),
      "alpha": (None,),
      "para": (False,),
    },
    training={"init_scale": 1.0, "deft_dropout": 0.0, "init_weights": True},
  )

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start: p normal, and what it takes away is put back.

    Raises:
      LoraxError: dropout, which PEFT has on one of its two terms.
    """
    if plan.dropout:
      raise LoraxError(f"deft has no dropout, not {plan.dropout}: leave it out")
    shapes = cls.layer_shapes(target)
    draw = lambda key: {"p": _STD * jax.random.normal(key, shapes["p"])}
    p = cls.drawn(target.key(key), target, draw)["p"]
    w = matrices(dense(kernel), target.roles, target.layers)
    stack = w.shape[:-2]
    taken = product(w, jax.nn.relu(p.reshape((*stack, -1, p.shape[-1]))))
    injected = taken.reshape((*stack, *shapes["injected"]))
    return cls.of_target({"p": p, "injected": injected}, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, of rank r."""
    p, injected = self.columns("p"), self.columns("injected")
    a = injected - product(self.matrices(w), jax.nn.relu(p))
    b = jnp.swapaxes(p, -1, -2)
    return Parts(
      self.placed(a, ("stack", "in", "rank"), w.shape),
      self.placed(b, ("stack", "rank", "out"), w.shape),
    )

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32, where 1 - pᵀ relu(p) has an inverse."""
    p, injected = self.columns("p"), self.columns("injected")
    kept, across = jax.nn.relu(p), jnp.swapaxes(p, -1, -2)
    # W = V + V relu(p) (1 - pᵀ relu(p))⁻¹ pᵀ of V = W' - injected pᵀ, by Woodbury.
    without = self.matrices(w) - product(injected, across)
    overlap = product(across, kept)
    inner = jnp.broadcast_to(jnp.eye(p.shape[-1]), overlap.shape) - overlap
    back = product(without, kept) @ jnp.linalg.solve(inner, across)
    delta = back - product(injected, across)
    return (
      w.astype(jnp.float32)
      + self.placed(delta, ("stack", "in", "out"), w.shape)[..., 0]
    )
