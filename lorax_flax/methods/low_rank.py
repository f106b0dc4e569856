"""The low-rank methods' common part: two factors beside a kernel, and their product."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import Shape
from lorax_flax.methods.kernel_delta import KernelDelta
from lorax_flax.methods.parts import Parts, dense
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class LowRank(KernelDelta):
  """A delta of one kernel that holds two factors; the base of LoRA and its kin.

  For a kernel whose axes have the roles in, out and stack (found by tracing):

  Attributes:
    a: (*stack, *in, r), float32, trained.
    b: (*stack, r, *out), float32, trained.
    scale: () or (*stack,), float32, alpha / r; data, so that trials may differ.
    roles: the role of each kernel axis, in the kernel's order.
    dropout: rate applied to the input of `a`, where a key is given.
    layers: where the leading stack axis is adapted in part, the indices on that
      axis that have factors; None for all.
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array
  roles: tuple[str, ...] = field(metadata={"static": True})
  dropout: float = field(default=0.0, metadata={"static": True})
  layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})

  axes: ClassVar = {
    "a": ("stack", "in", "rank"),
    "b": ("stack", "rank", "out"),
    "scale": ("stack",),
  }
  trained: ClassVar[tuple[str, ...]] = ("a", "b")
  takes_init: ClassVar[bool] = True

  def factors(self, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """a and b in the layout of `Parts`, the scale folded into b."""
    b = self.laid_out("b", shape, value=self.scaled(self.b))
    return self.laid_out("a", shape), b

  def scaled(self, leaf: jax.Array) -> jax.Array:
    """A leaf, its stack axes first, times the scale."""
    ones = (1,) * (leaf.ndim - self.scale.ndim)
    return leaf * self.scale.reshape(self.scale.shape + ones)

  def delta(self, shape: Shape) -> jax.Array:
    """scale * a @ b, dense, float32, in the kernel's `shape`."""
    return dense(*self.factors(shape), jnp.float32)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    return Parts(*self.factors(w.shape))
