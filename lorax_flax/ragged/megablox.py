"""Ragged products on TPUs by JAX's megablox kernels, which skip rows of no group.

Shapes: as in `lorax_flax.ragged`.
"""

from typing import Any

import jax
import jax.numpy as jnp

_LANES = 128
# Numbers of rows of a block, of which the largest that divides the rows is taken; and
# the most columns.
_ROWS = (512, 256, _LANES)
_COLUMNS = 1024


def product(
  x_NxI: jax.Array,
  w: jax.Array,
  sizes_E: jax.Array,
  *,
  turned: bool,
  interpret: bool = False,
) -> jax.Array:
  """See `ragged.product`.

  Args:
    interpret: the kernel is interpreted, on any platform.
  """
  # Here, since it takes long to import, and is of one platform.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  rows = x_NxI.shape[0]
  x_NxI = _filled(x_NxI)
  tiling = _tiling(x_NxI.shape[0], x_NxI.shape[1], w.shape[1 if turned else 2])
  sizes = _with_rest(sizes_E, x_NxI.shape[0])
  options = {"transpose_rhs": turned, "interpret": interpret}
  with _promotion():
    y_NxO = gmm(x_NxI, w, sizes, x_NxI.dtype, tiling, **options)
  return y_NxO[:rows]


def outer(
  x_NxI: jax.Array, y_NxO: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """See `ragged.outer` and `product`."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  x_NxI, y_NxO = _filled(x_NxI), _filled(y_NxO)
  sizes, count = _with_rest(sizes_E, x_NxI.shape[0]), sizes_E.shape[0]
  tiling = _tiling(x_NxI.shape[0], x_NxI.shape[1], y_NxO.shape[1])
  options = {"num_actual_groups": count, "interpret": interpret}
  with _promotion():
    return tgmm(x_NxI.swapaxes(0, 1), y_NxO, sizes, x_NxI.dtype, tiling, **options)


def _promotion() -> Any:
  """Context of the kernels' own code, which adds booleans to integers."""
  return jax.numpy_dtype_promotion("standard")


def _with_rest(sizes_E: jax.Array, rows: int) -> jax.Array:
  """The sizes, and the rows of no group as a last one without a matrix.

  The kernel sets their results to zero, which it would leave unwritten.
  """
  return jnp.append(sizes_E, rows - sizes_E.sum()).astype(jnp.int32)


def _tiling(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
  size = next(size for size in _ROWS if rows % size == 0)
  return size, min(inputs, _COLUMNS), min(outputs, _COLUMNS)


def _filled(x_Nx: jax.Array) -> jax.Array:
  """x with zeros up to full blocks."""
  return jnp.pad(x_Nx, [(0, -x_Nx.shape[0] % _LANES), (0, 0)])
