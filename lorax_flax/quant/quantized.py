"""A quantised weight: a leaf of a params tree that holds codes in place of numbers."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError


@dataclass(frozen=True)
class Quantized:
  """A kernel (*stack, in, out) as codes and scales; the base of the formats.

  Codes have torch's layout, (*stack, out, in): blocks run along the contracted axis,
  and codes are those that bitsandbytes gives the weight of a torch.nn.Linear. The stack
  axes (layers, experts) come first in every array, so that a scan slices a leaf as it
  slices a kernel.

  Attributes:
    codes: (*stack, out, in / per_code).
    dtype: static, of the dense kernel.
    axes: of a format, for each array the kernel axis that each of its last axes runs
      along, "out" or "in", or None; its first axes are the stack's.
    per_code: of a format, number of weights in one element of `codes`.
    block: of a format, number of weights along "in" that share a scale; 1 where all do.
  """

  codes: jax.Array
  dtype: Any = field(metadata={"static": True}, kw_only=True)

  axes: ClassVar[Mapping[str, tuple[str | None, ...]]]
  per_code: ClassVar[int] = 1
  block: ClassVar[int] = 1

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """The codes of (*stack, out, in) float32."""
    raise NotImplementedError

  @classmethod
  def by_rows(cls) -> "type[Quantized]":
    """The format in which each output's weights are quantised by themselves."""
    return cls

  @classmethod
  def from_rows(cls, rows: Any) -> Self:
    """The leaf, of that of one kernel in the format `by_rows`."""
    return rows

  def matrices(self) -> jax.Array:
    """The weights, (*stack, out, in), computed in float32 and rounded to `dtype`."""
    raise NotImplementedError

  @classmethod
  def check(cls, shape: tuple[int, ...]) -> None:
    """Raises LoraxError for a kernel of a shape that the format does not take."""
    if len(shape) < 2:
      raise LoraxError(f"a kernel (…, in, out) is quantised, not an array of {shape}")
    if shape[-2] % cls.block:
      raise LoraxError(
        f"the contracted axis of {shape} is {shape[-2]}, no multiple of the block of"
        f" {cls.block}"
      )

  @classmethod
  def struct(cls, shape: tuple[int, ...], dtype: Any) -> Self:
    """The leaf of a kernel (*stack, in, out), of ShapeDtypeStructs."""
    *stack, fan_in, fan_out = shape
    m = jax.ShapeDtypeStruct((*stack, fan_out, fan_in), jnp.float32)
    return jax.eval_shape(lambda m: cls.of_matrices(m, jnp.dtype(dtype)), m)

  @property
  def shape(self) -> tuple[int, ...]:
    *stack, out, packed = self.codes.shape
    return (*stack, packed * self.per_code, out)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of weights."""
    return self.codes.size * self.per_code

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for x in self.arrays().values())

  def arrays(self) -> dict[str, Any]:
    """The arrays by name."""
    named = {f.name: getattr(self, f.name) for f in fields(self)}
    return {name: x for name, x in named.items() if name in self.axes}

  def dense(self) -> jax.Array:
    """The kernel, (*stack, in, out), in `dtype`."""
    return _dense(self)

  def __jax_array__(self) -> jax.Array:
    raise LoraxError(
      f"a quantised weight of shape {self.shape} meets a function that takes arrays:"
      " lx.adapt(fn, config).apply(params, {}, …) runs fn on a quantised base, and"
      " quant.dense(leaf) is the weight as an array"
    )


# One program: step by step, each of the intermediate arrays would be stored.
@functools.partial(jax.jit, inline=True)
def _dense(leaf: Quantized) -> jax.Array:
  return leaf.matrices().mT


def is_quantized(x: Any) -> bool:
  return isinstance(x, Quantized)


def dense(x: Any) -> Any:
  """The weight as an array, be it quantised, deferred or neither."""
  return x.dense() if hasattr(x, "dense") else x
