"""C3A (arXiv 2407.19342): a change made of circulant blocks."""

from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import fans, quotient
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class C3A(MethodDelta):
  """W' = W + K / in, K's block (q, p) [t, s] = circulant[p, q, (t - s) mod n].

  Attributes:
    circulant: (*stack, out / n, in / n, n), float32, trained; starts at zero, n the
      option block_size.
  """

  circulant: jax.Array

  axes: ClassVar = {"circulant": ("stack", "out_blocks", "in_blocks", "block_size")}
  trained = ("circulant",)
  per_trial = ()
  has_rank = False
  takes_tables = False
  options: ClassVar = {"block_size": 256}
  peft = PeftForm(
    type="C3A",
    keys={"linear": {"c3a_kernel": ("circulant", AS_IS)}},
    fields={"bias": ("bias", "none")},
    lacks=("exclude_modules",),
    options={"block_size": "block_size"},
    off={"block_size_pattern": ({},)},
    # PEFT's own default is "xavier_uniform", which does not start at the base.
    training={"init_weights": True},
    targets={"gpt2": ("mlp.c_proj",)},
  )

  @property
  def block_size(self) -> int:
    return self.circulant.shape[-1]

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    n, found = sizes["block_size"], dict(sizes)
    for side, fan in zip(("in", "out"), fans(shape, roles), strict=True):
      found[f"{side}_blocks"] = quotient(
        "c3a: block_size", n, fan, f"{side}puts", shape
      )
    return found

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """Zero."""
    del kernel
    return cls.zeros(key, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, its change formed."""
    *stack, outs, ins, n = self.circulant.shape
    steps = jnp.arange(n)
    blocks = self.circulant[..., (steps[:, None] - steps[None]) % n]  # p q t s
    depth = len(stack)
    order = (*range(depth), *(depth + i for i in (1, 2, 0, 3)))
    k = blocks.transpose(order).reshape((*stack, ins * n, outs * n))
    return self.full_parts(k / (ins * n), w.shape)
