"""LoRA on some parts of a fused kernel: loralib's MergedLinear (arXiv 2106.09685).

A fused kernel has equal parts side by side on its out axis, as GPT-2's c_attn has
query, key and value. Each part that is adapted has two factors of its own.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import Shape, by_role
from lorax_flax.methods.draws import uniform
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.parts import Parts
from lorax_flax.nodes import node


@node
@dataclass(frozen=True, kw_only=True)
class FusedLoRA(MethodDelta):
  """W' = W + scale * a[n] @ b[n] in the columns of the n-th part that is adapted.

  Attributes:
    a: (*stack, *in, n, r), float32, trained.
    b: (*stack, n, r, out / parts), float32, trained; starts at zero.
    scale: () or (*stack,), alpha / r.
    enable_lora: for each part of the out axis, whether it is adapted; n of them are.
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array
  enable_lora: tuple[bool, ...] = field(metadata={"static": True})

  axes: ClassVar = {
    "a": ("stack", "in", "adapted", "rank"),
    "b": ("stack", "adapted", "rank", "columns"),
    "scale": ("stack",),
  }
  trained = ("a", "b")
  takes_tables = False
  # Query and value of a query, a key and a value, as in the paper.
  options: ClassVar = {"enable_lora": (True, False, True)}

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    flags = tuple(sizes["enable_lora"])
    if not all(isinstance(flag, bool) for flag in flags) or not any(flags):
      raise LoraxError(
        f"fused_lora: enable_lora={flags} has True for each part of a kernel's outputs "
        "that is adapted, and False for the others; one at least is adapted"
      )
    width = math.prod(shape[axis] for axis in by_role(roles)["out"])
    if width % len(flags):
      raise LoraxError(
        f"fused_lora: enable_lora={flags} has {len(flags)} parts, which do not divide "
        f"the {width} outputs of a kernel of shape {shape}"
      )
    return dict(sizes) | {"adapted": sum(flags), "columns": width // len(flags)}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """LoRA's start, which is loralib's: a uniform, b zero."""
    del kernel
    shapes = cls.layer_shapes(target)
    fan_in = math.prod(shapes["a"][:-2])

    def draw(key):
      return {"a": uniform(key, shapes["a"], fan_in), "b": jnp.zeros(shapes["b"])}

    return cls.of_target(cls.drawn(target.key(key), target, draw), target, plan)

  def check(self, path: str, base: Shape) -> None:
    super().check(path, base)
    sizes = {"enable_lora": self.enable_lora, "rank": self.rank}
    shape = self.leaf_shape("b", base, self.roles, sizes)[self.roles.count("stack") :]
    found = self.b.shape[self.roles.count("stack") :]
    if found != shape:
      raise LoraxError(
        f"the adapter's delta of {path!r} has 'b' of shape {found} a layer, and "
        f"{shape} was expected beside the base's {base}"
      )

  def _wide(self) -> tuple[jax.Array, jax.Array]:
    """a (*stack, in, n r), and b (*stack, n r, out) with its blocks on a diagonal."""
    depth = self.roles.count("stack")
    stack, (n, rank, columns) = self.b.shape[:depth], self.b.shape[depth:]
    places = np.eye(len(self.enable_lora), dtype=np.float32)[list(self.enable_lora)]
    b = jnp.einsum("...nrc,np->...nrpc", self.b, places)
    return (
      self.a.reshape((*stack, -1, n * rank)),
      b.reshape((*stack, n * rank, len(self.enable_lora) * columns)),
    )

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated, of rank n r."""
    a, b = self._wide()
    return Parts(
      self.placed(a, ("stack", "in", "rank"), w.shape),
      self.placed(b, ("stack", "rank", "out"), w.shape)
      * self.laid_out("scale", w.shape),
    )

  def as_lora(self) -> LoRA:
    """Plain LoRA of rank n r with the same delta; its b has zeros.

    Trained further, it changes every column.
    """
    a, b = self._wide()
    return LoRA(
      a=a,
      b=b,
      scale=self.scale,
      roles=self.roles,
      dropout=self.dropout,
      layers=self.layers,
    )
