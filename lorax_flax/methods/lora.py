"""LoRA (arXiv 2106.09685): W + scale * a @ b, the product never formed."""

import math
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.kernel_delta import Plan, Target
from lorax_flax.methods.low_rank import LowRank
from lorax_flax.methods.peft_form import AS_IS, TRANSPOSED, Form, PeftForm
from lorax_flax.nodes import node

# A and B of a PEFT folder. An embedding's A is our b where a linear layer shares its
# weight, for our leaves are named by the look-up.
KEYS = {
  "linear": {
    "lora_A.weight": ("a", TRANSPOSED),
    "lora_B.weight": ("b", TRANSPOSED),
  },
  "embedding": {
    "lora_embedding_A": ("a", TRANSPOSED),
    "lora_embedding_B": ("b", TRANSPOSED),
  },
  "conv": {
    "lora_A.weight": ("a", Form((2, 3, 1, 0))),
    "lora_B.weight": ("b", Form((1, 0), ones=(2, 3))),
  },
  "turned": {"lora_A.weight": ("b", AS_IS), "lora_B.weight": ("a", AS_IS)},
  "experts": {
    "lora_A.weight": ("a", Form((0, 2, 1), split=0)),
    "lora_B.weight": ("b", Form((2, 1, 0), split=1)),
  },
}


@node
@dataclass(frozen=True)
class LoRA(LowRank):
  """The low-rank delta of one kernel: W' = W + scale * a @ b. Fields of `LowRank`."""

  peft = PeftForm(None, KEYS)

  @classmethod
  def start(cls, key: jax.Array, kernel: Any, target: Target, plan: Plan) -> Self:
    """Factors whose product is zero, in the style of the target.

    "uniform": a uniform within 1 / sqrt(fan in), b zero (PEFT's default, torch
    kaiming_uniform with a = sqrt 5). "gaussian": a normal with std 1 / r, b zero.
    "orthogonal": normal rows of a and columns of b, in ranks orthogonal to each other.
    "embedding": a zero, b normal with std 1 (PEFT's Embedding).
    "eva": a the directions of the inputs, b zero.

    Raises:
      LoraxError: a start of PEFT's that isn't built here; an orthogonal one of an odd
        rank, or of stacked layers of unlike ranks.
    """
    del kernel
    if target.style == "orthogonal" and (target.rank % 2 or target.ranks is not None):
      raise LoraxError(
        f"init='orthogonal' needs an even rank, the same in all layers, not"
        f" {target.ranks or target.rank} at {target.path!r}"
      )
    if target.style == "mica":
      raise LoraxError(
        f"init={target.style!r} is how PEFT starts an adapter, and not built here: "
        "choose init='uniform', 'gaussian', 'orthogonal' or 'eva', or read PEFT's "
        "adapter with its start"
      )
    shapes = cls.layer_shapes(target)
    a_shape, b_shape = shapes["a"], shapes["b"]
    if target.style == "eva":
      vectors = target.measured.vectors[..., : target.rank]
      stack = vectors.shape[:-2]
      leaves = {"a": vectors.reshape(*stack, *a_shape)}
      leaves["b"] = jnp.zeros((*stack, *b_shape))
      return cls.of_target(cls.within_ranks(leaves, target), target, plan)

    def draw(key):
      if target.style == "embedding":
        a, b = jnp.zeros(a_shape), jax.random.normal(key, b_shape, jnp.float32)
      elif target.style == "orthogonal":
        a, b = _orthogonal(key, a_shape, b_shape)
      elif target.style == "gaussian":
        a = jax.random.normal(key, a_shape, jnp.float32) / target.rank
        b = jnp.zeros(b_shape)
      else:
        bound = 1 / math.sqrt(math.prod(a_shape[:-1]))
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
        b = jnp.zeros(b_shape)
      return {"a": a, "b": b}

    leaves = cls.drawn(target.key(key), target, draw)
    if target.style == "gaussian" and target.ranks is not None:
      # The std is that of the layer's own rank.
      own = jnp.asarray(target.ranks).reshape(-1, *[1] * (leaves["a"].ndim - 1))
      leaves["a"] = leaves["a"] * (target.rank / own)
    return cls.of_target(leaves, target, plan)


def _orthogonal(
  key: jax.Array, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Normal factors within two halves of an orthonormal basis: their product is zero."""
  rank = a_shape[-1]
  of_basis, of_a, of_b = jax.random.split(key, 3)
  basis = jnp.linalg.qr(jax.random.normal(of_basis, (rank, rank)))[0]
  a = jax.random.normal(of_a, (*a_shape[:-1], rank // 2)) @ basis[0::2]
  b = jax.random.normal(of_b, (rank // 2, *b_shape[1:]))
  return a / 10, jnp.tensordot(basis[1::2].T, b, 1) / 10
