"""Blocks of GGUF files as they are stored, an array for each field of a block."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.quant import blocks
from lorax_flax.quant.quantized import Quantized


class Ggml(Quantized):
  """A kernel in the blocks of a GGUF file; the base of these formats.

  Each array is (*stack, out, blocks * elements in one block). Source of the layouts:
  the `gguf` package.

  Attributes:
    parts: of a format, the dtype and number of elements of each array in a block, in
      the order of the file's bytes.
  """

  parts: ClassVar[Mapping[str, tuple[Any, int]]]

  @classmethod
  def row_bytes(cls, count: int) -> int:
    """Bytes of a row of so many weights."""
    size = sum(np.dtype(dtype).itemsize * n for dtype, n in cls.parts.values())
    return count // cls.block * size

  @classmethod
  def of_rows(cls, rows: np.ndarray, dtype: Any) -> Self:
    """The leaf of a file's rows, (*stack, out, bytes) uint8; arrays of NumPy."""
    row = rows.reshape((*rows.shape[:-1], -1, cls.row_bytes(cls.block)))
    found: dict[str, Any] = {}
    start = 0
    for name, (kind, n) in cls.parts.items():
      stop = start + n * np.dtype(kind).itemsize
      field = np.ascontiguousarray(row[..., start:stop]).view(kind)
      found[name], start = field.reshape((*rows.shape[:-1], -1)), stop
    return cls(**found, dtype=dtype)

  @classmethod
  def of_matrices(cls, m: jax.Array, dtype: Any) -> Self:
    raise LoraxError(
      f"{cls.__name__} blocks are read from GGUF files (quant as_stored), and are not"
      " made here"
    )

  @classmethod
  def struct(cls, shape: tuple[int, ...], dtype: Any) -> Self:
    *stack, fan_in, fan_out = shape
    number = fan_in // cls.block
    arrays: dict[str, Any] = {
      name: jax.ShapeDtypeStruct((*stack, fan_out, number * n), jnp.dtype(kind))
      for name, (kind, n) in cls.parts.items()
    }
    return cls(**arrays, dtype=jnp.dtype(dtype))


def halves(codes: jax.Array, size: int) -> jax.Array:
  """4-bit codes: of each `size` bytes the low bits, and then the high bits."""
  codes = blocks.split(codes, size)
  return blocks.join(blocks.join(jnp.stack([codes & 15, codes >> 4], -2)))


def packed(codes: jax.Array, size: int) -> jax.Array:
  """The inverse of `halves`."""
  pairs = blocks.split(codes, size)
  return blocks.join(pairs[..., ::2, :] | (pairs[..., 1::2, :] << 4))


def inverse(steps: jax.Array) -> jax.Array:
  """1 / x, of either sign; 0 for 0."""
  return jnp.where(steps == 0, 0.0, 1.0 / jnp.where(steps == 0, 1.0, steps))
