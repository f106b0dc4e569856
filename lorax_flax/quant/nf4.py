"""NormalFloat of 4 bits, with and without double quantisation (arXiv 2305.14314).

Code book, layout, codes and values are those of bitsandbytes 0.50.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.nodes import node
from lorax_flax.quant import blocks
from lorax_flax.quant.four_bit import FourBit

# Quantiles of a normal, scaled to [-1, 1]: bitsandbytes' table.
CODE = np.array(
  [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
   -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
   0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
   0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
  np.float32,
)  # fmt: skip


def _linspace(first: float, last: float, n: int) -> np.ndarray:
  """float32 numbers at equal distances, rounded as torch rounds them.

  From both ends, by multiples of a float32 step that are added with one rounding.
  """
  start, stop = np.float32(first), np.float32(last)
  step, i = np.float64((stop - start) / np.float32(n - 1)), np.arange(n)
  up, down = np.float64(start) + step * i, np.float64(stop) - step * (n - 1 - i)
  return np.where(i < n // 2, up, down).astype(np.float32)


def _dynamic() -> np.ndarray:
  """bitsandbytes' signed 8-bit code of scales: 7 decades, finer for larger values."""
  values = [0.0, 1.0]
  for decade in range(7):
    edges = _linspace(0.1, 1, 2**decade + 1)
    means = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2)
    values += [*means, *-means]
  return np.sort(np.array(values, np.float32))


DYNAMIC = _dynamic()


@node
@dataclass(frozen=True)
class NF4(FourBit):
  """W = CODE[codes] * absmax, two codes in a byte.

  Attributes:
    absmax: (*stack, in / block, out) float32.
  """

  absmax: jax.Array

  axes: ClassVar = {"codes": ("out", "in"), "absmax": ("in", "out")}

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """The nearest codes of each block."""
    codes, absmax = _quantized(m, CODE, cls.block)
    return cls(blocks.pack(codes), absmax.mT, dtype=dtype)

  @staticmethod
  def values(codes: jax.Array) -> jax.Array:
    return blocks.looked_up(codes, CODE.tolist())

  def steps(self) -> jax.Array:
    return self.absmax


@node
@dataclass(frozen=True)
class DoubleNF4(FourBit):
  """NF4 whose scales are quantised: absmax = DYNAMIC[scales] * scales_absmax + mean.

  Attributes:
    scales: (*stack, in / block, out) uint8.
    scales_absmax: (*stack, n) float32, of groups of 256 of one kernel's scales, which
      stand in the order of a torch weight: those of an output together.
    mean: (*stack, 1) float32, of one kernel's scales.
  """

  scales: jax.Array
  scales_absmax: jax.Array
  mean: jax.Array

  axes: ClassVar = {
    "codes": ("out", "in"),
    "scales": ("in", "out"),
    "scales_absmax": (None,),
    "mean": (None,),
  }
  group: ClassVar[int] = 256

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    """The codes of `NF4`, their scales quantised."""
    return cls.from_rows(NF4.of_matrices(m, dtype))

  @classmethod
  def by_rows(cls) -> type[NF4]:
    return NF4

  @classmethod
  def from_rows(cls, rows: NF4) -> Self:
    absmax = rows.absmax.mT
    flat = blocks.join(absmax)
    mean = flat.mean(-1, keepdims=True)
    more = -flat.shape[-1] % cls.group
    padded = jnp.pad(flat - mean, [(0, 0)] * (flat.ndim - 1) + [(0, more)])
    scales, scales_absmax = _quantized(padded, DYNAMIC, cls.group)
    scales = scales[..., : flat.shape[-1]].reshape(absmax.shape).mT
    return cls(rows.codes, scales, scales_absmax, mean, dtype=rows.dtype)

  values = staticmethod(NF4.values)

  def steps(self) -> jax.Array:
    *stack, count, out = self.scales.shape
    spread = jnp.repeat(self.scales_absmax, self.group, -1)[..., : count * out]
    spread = spread.reshape(*stack, out, count).mT
    # The maximum is the product itself; without one, compilers would make a fused
    # multiply-add, and round where bitsandbytes does not.
    absmax = jnp.maximum(jnp.asarray(DYNAMIC)[self.scales] * spread, -spread)
    return absmax + self.mean[..., None]


def _quantized(
  x: jax.Array, code: np.ndarray, size: int
) -> tuple[jax.Array, jax.Array]:
  """Indices of the code book for blocks along the last axis, and the blocks' scales."""
  parts = blocks.split(x, size)
  absmax = blocks.absmax(parts)
  scaled = jnp.clip(parts * blocks.inverse(absmax)[..., None], -1, 1)
  return blocks.join(blocks.nearest(scaled, code)), absmax
