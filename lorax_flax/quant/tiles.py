"""Products with 4-bit kernels on TPUs, which form no dense kernel in main memory.

A Pallas kernel reads the codes as they are stored, makes a tile of the dense kernel on
the chip, and multiplies by it. The numbers of a tile are those of `Quantized.dense`;
sums of products are float32.

Shapes: N rows, I the kernel's "in" axis, O its "out" axis; J is the axis of the two
that a product keeps, K the one that it contracts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorax_flax import devices
from lorax_flax.quant.four_bit import FourBit
from lorax_flax.quant.quantized import Quantized

# Numbers of rows of x, and of a tile's rows and columns, of which the largest that
# divides an axis is taken. Half a tile's rows are lanes of its codes, at least 128.
_ROWS = 1024
_IN, _OUT = (512, 256), (512, 256, 128)
# Of the kernel in a program.
NAME = "four_bit_product"


def takes(leaf: Quantized, x: Any) -> bool:
  """True for what the kernel computes, on the mesh of the context.

  On a mesh each device multiplies its rows by the full kernel, of which the codes are
  gathered. Where products are sharded too (tensor parallelism), the compiler shards
  those with dense kernels.

  Args:
    x: (…, K), an array or its shape and dtype.
  """
  if not isinstance(leaf, FourBit) or leaf.ndim != 2 or x.ndim < 2:
    return False
  if not jnp.dtype(leaf.dtype) == x.dtype == jnp.bfloat16:
    return False
  if leaf.shape[0] % _IN[-1] or leaf.shape[1] % _OUT[-1]:
    return False
  sizes = jax.sharding.get_abstract_mesh().shape
  apart = math.prod(sizes.values())
  rows = math.prod(sizes.get(name, 1) for name in devices.ROWS)
  return apart == rows and x.shape[0] % rows == 0


def product(
  leaf: FourBit,
  x: jax.Array,
  *,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """x W, or x Wᵀ, of what `takes` allows.

  Args:
    x: (…, K), bfloat16, as the result is.
    transposed: Wᵀ is meant, as in the gradient by x.
    interpret: the kernel is interpreted, on any platform.

  Returns:
    (…, J).
  """
  fan_in, _ = leaf.shape
  tile = _largest(_IN, fan_in)
  # Steps of a tile are rows of its columns: a step is broadcast down its block.
  steps_TxBxO = leaf.steps().reshape(fan_in // tile, tile // leaf.block, -1)

  def run(x, codes_OxP, steps_TxBxO):
    x_NxK = x.reshape(-1, x.shape[-1])
    y_NxJ = _call(x_NxK, codes_OxP, steps_TxBxO, leaf.values, transposed, interpret)
    return y_NxJ.reshape(*x.shape[:-1], -1)

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    rows, full = PartitionSpec(devices.ROWS), PartitionSpec()
    specs = (rows, full, full)
    run = jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)
  return run(x, leaf.codes, steps_TxBxO)


def _largest(sizes: tuple[int, ...], length: int) -> int:
  return next(size for size in sizes if length % size == 0)


def _call(
  x_NxK: jax.Array,
  codes_OxP: jax.Array,
  steps_TxBxO: jax.Array,
  values: Callable[[jax.Array], jax.Array],
  transposed: bool,
  interpret: bool,
) -> jax.Array:
  # Here, since it takes long to import, and is of one platform.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  (n, _), (tiles, blocks, fan_out) = x_NxK.shape, steps_TxBxO.shape
  fan_in = 2 * codes_OxP.shape[1]
  tile_in, tile_out = fan_in // tiles, _largest(_OUT, fan_out)
  rows = min(_ROWS, n + -n % 16)
  kept, contracted = (fan_in, tile_in), (fan_out, tile_out)
  if not transposed:
    kept, contracted = contracted, kept

  def of_kernel(place: Callable[[int, int], tuple[int, ...]]) -> Callable:
    """The index of a block, by the numbers of the tile along "in" and "out"."""
    return lambda _, j, k: place(j, k) if transposed else place(k, j)

  return pl.pallas_call(
    functools.partial(_body, values=values, axis=1 if transposed else 0),
    grid=(pl.cdiv(n, rows), kept[0] // kept[1], contracted[0] // contracted[1]),
    in_specs=[
      pl.BlockSpec((rows, contracted[1]), lambda n, j, k: (n, k)),
      pl.BlockSpec((tile_out, tile_in // 2), of_kernel(lambda i, o: (o, i))),
      pl.BlockSpec((None, blocks, tile_out), of_kernel(lambda i, o: (i, 0, o))),
    ],
    out_specs=pl.BlockSpec((rows, kept[1]), lambda n, j, k: (n, j)),
    out_shape=jax.ShapeDtypeStruct((n, kept[0]), x_NxK.dtype),
    scratch_shapes=[pltpu.VMEM((rows, kept[1]), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
    name=NAME,
  )(x_NxK, codes_OxP, steps_TxBxO)


def _body(x_ref, codes_ref, steps_ref, y_ref, sum_ref, *, values, axis: int) -> None:
  """Adds x times a tile, which contracts one of the tile's axes."""
  from jax.experimental import pallas as pl

  k = pl.program_id(2)

  @pl.when(k == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  sum_ref[...] += lax.dot_general(
    x_ref[...],
    _tile(codes_ref[...], steps_ref[...], values),
    (((1,), (axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _tile(codes_OxP: jax.Array, steps_BxO: jax.Array, values) -> jax.Array:
  """A tile of the kernel, IxO bfloat16.

  Two rows of bfloat16 are the halves of one row of words: codes are not interleaved, a
  byte's two weights are put into a word.
  """
  from jax.experimental.pallas import tpu as pltpu

  codes_PxO = codes_OxP.astype(jnp.int32).T
  blocks, out = steps_BxO.shape
  pairs = codes_PxO.shape[0] // blocks
  steps_PxO = jnp.broadcast_to(steps_BxO[:, None, :], (blocks, pairs, out))
  steps_PxO = steps_PxO.reshape(codes_PxO.shape)
  even = _rounded(values(codes_PxO >> 4) * steps_PxO)
  odd = _rounded(values(codes_PxO & 15) * steps_PxO)
  words = lax.shift_right_logical(even, 16) | (odd & -(2**16))
  return pltpu.bitcast(words, jnp.bfloat16)


def _rounded(x: jax.Array) -> jax.Array:
  """The bits of float32 numbers, of which the upper 16 are the nearest bfloat16's.

  Ties to even. Of a pair of conversions a compiler may leave nothing.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return bits + 0x7FFF + (lax.shift_right_logical(bits, 16) & 1)
