"""RandLoRA (arXiv 2502.00987): random factors of full rank, scaled by trained ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.methods.axes import fans
from lorax_flax.methods.draws import Torch
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, Form, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class RandLoRA(MethodDelta):
  """W' = W + scale * Σ_k b_k diag(lam_k) a diag(gamma_k), of n = low / r bases k.

  low is the smaller side of the kernel and high the larger; the sum is (high, low).

  Attributes:
    lam: (*stack, r, n), float32, trained; starts at zero.
    gamma: (*stack, n, low), float32, trained.
    a: (r, widest low), float32, shared by all targets, of which each takes the first.
    b: (widest high, widest n, r), float32, likewise.
    scale: () or (*stack,), alpha / r.
  """

  lam: jax.Array
  gamma: jax.Array
  a: jax.Array
  b: jax.Array
  scale: jax.Array

  axes: ClassVar = {
    "lam": ("stack", "rank", "bases"),
    "gamma": ("stack", "bases", "low"),
    "a": ("rank", "widest_low"),
    "b": ("widest_high", "widest_bases", "rank"),
    "scale": ("stack",),
  }
  trained = ("lam", "gamma")
  options: ClassVar = {"projection_prng_key": 0}
  pads_rank = False
  takes_tables = False
  peft = PeftForm(
    type="RANDLORA",
    keys={
      "linear": {
        "randlora_lambda": ("lam", AS_IS),
        "randlora_gamma": ("gamma", AS_IS),
      }
    },
    shared={"randlora_A": ("a", Form(ones=(1,))), "randlora_B": ("b", AS_IS)},
    repeats_shared=True,
    fields={
      "r": ("r", 32),
      "randlora_alpha": ("lora_alpha", 640),
      "randlora_dropout": ("lora_dropout", 0.0),
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    lacks=("exclude_modules",),
    options={"projection_prng_key": "projection_prng_key"},
    off={"save_projection": (True,)},
    # How the factors were drawn, which the folder holds.
    training={"sparse": False, "very_sparse": False, "init_weights": True},
  )

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    low, high = sorted(fans(shape, roles))
    bases = math.ceil(low / sizes["rank"])
    own = {"low": low, "high": high, "bases": bases}
    return {**sizes, **own, **{f"widest_{name}": n for name, n in own.items()}}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start, lam zero; the factors are uniform with a std of one.

    PEFT draws its own in half precision, so they are not the same numbers.
    """
    del kernel
    shapes = cls.layer_shapes(target)

    def draw(key):
      del key
      gamma = jnp.full(shapes["gamma"], 1 / max(shapes["gamma"]))
      return {"lam": jnp.zeros(shapes["lam"]), "gamma": gamma}

    leaves = cls.drawn(target.key(key), target, draw)
    a, b = cls._projections([fans(t.shape, t.roles) for t in plan.targets], target)
    return cls.of_target({**leaves, "a": a, "b": b}, target, plan)

  @classmethod
  def _projections(cls, each: Sequence[tuple[int, int]], target):
    widest = tuple(max(sizes) for sizes in zip(*each, strict=True))
    sizes = {"rank": target.rank}
    stream = Torch(target.options["projection_prng_key"])
    for name in ("a", "b"):
      x = stream.uniform(cls.leaf_shape(name, widest, ("in", "out"), sizes), 1.0)
      yield jnp.asarray(x / np.std(x))

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel; of the two factors that are multiplied, one is frozen."""
    fan_in, fan_out = fans(w.shape, self.roles)
    low, high = sorted((fan_in, fan_out))
    *stack, rank, n = self.lam.shape
    scaled = "...rn,rl,...nl->...rnl"
    a = jnp.einsum(scaled, self.lam, self.a[:, :low], self.gamma)
    # PEFT flattens the two in different orders, so that a base's vectors are mixed.
    a = a.reshape((*stack, rank * n, low))
    b = self.b[:high, :n].reshape((high, n * rank))
    if fan_in > fan_out:
      first = self.placed(b, ("in", "rank"), w.shape)
      second = self.placed(a, ("stack", "rank", "out"), w.shape)
    else:
      first = self.placed(jnp.swapaxes(a, -1, -2), ("stack", "in", "rank"), w.shape)
      second = self.placed(b.T, ("rank", "out"), w.shape)
    return Parts(first, second * self.laid_out("scale", w.shape))
