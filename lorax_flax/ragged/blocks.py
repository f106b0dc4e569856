"""Ragged products by a loop over blocks of rows, each of one group.

Shapes: as in `lorax_flax.ragged`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# The most rows of a block. A group's last block is not full, and so a block has no more
# rows than a group has on average.
_ROWS = 256


def product(
  x_NxI: jax.Array, w: jax.Array, sizes_E: jax.Array, *, turned: bool
) -> jax.Array:
  """See `ragged.product`."""
  out = w.shape[1 if turned else 2]
  dims = (((1,), (1 if turned else 0,)), ((), ()))

  def add(y_NxO, group, at, own_R):
    x_RxI = lax.dynamic_slice_in_dim(x_NxI, at, own_R.shape[0])
    y_RxO = lax.dot_general(x_RxI, w[group], dims, preferred_element_type=x_NxI.dtype)
    before = lax.dynamic_slice_in_dim(y_NxO, at, own_R.shape[0])
    y_RxO = jnp.where(own_R[:, None], y_RxO, before)
    return lax.dynamic_update_slice_in_dim(y_NxO, y_RxO, at, 0)

  return _over(add, jnp.zeros((x_NxI.shape[0], out), x_NxI.dtype), sizes_E)


def outer(x_NxI: jax.Array, y_NxO: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `ragged.outer`."""
  wide = jnp.promote_types(x_NxI.dtype, jnp.float32)

  def add(made, group, at, own_R):
    x_RxI, y_RxO = (
      lax.dynamic_slice_in_dim(t, at, own_R.shape[0]) for t in (x_NxI, y_NxO)
    )
    x_RxI = jnp.where(own_R[:, None], x_RxI, 0)
    more = jnp.einsum("RI,RO->IO", x_RxI, y_RxO, preferred_element_type=wide)
    return made.at[group].add(more)

  shape = sizes_E.shape[0], x_NxI.shape[1], y_NxO.shape[1]
  made = _over(add, jnp.zeros(shape, wide), sizes_E, x_NxI.shape[0])
  return made.astype(x_NxI.dtype)


def _over(
  add: Callable[..., jax.Array],
  start: jax.Array,
  sizes_E: jax.Array,
  rows: int | None = None,
) -> jax.Array:
  """The sum over blocks: `add` of what there is, a group, a place, and the own rows.

  The number of iterations is static, so that costs can be counted; those that no group
  needs do nothing.
  """
  rows = start.shape[0] if rows is None else rows
  size = min(_ROWS, math.ceil(rows / sizes_E.shape[0]))
  count_E = (sizes_E + size - 1) // size
  ends_E, stop_E = jnp.cumsum(count_E), jnp.cumsum(sizes_E)
  most = min(rows, math.ceil(rows / size) + sizes_E.shape[0])
  # M blocks, all at once: products with the same groups then share this.
  blocks_M = jnp.arange(most, dtype=ends_E.dtype)
  group_M = jnp.searchsorted(ends_E, blocks_M, side="right", method="compare_all")
  group_M = jnp.minimum(group_M, sizes_E.shape[0] - 1).astype(jnp.int32)
  first_M = (stop_E - sizes_E - (ends_E - count_E) * size)[group_M] + blocks_M * size
  until_M = stop_E[group_M]

  def step(i, made):
    first = first_M[i]
    at = jnp.minimum(first, rows - size)
    places_R = at + jnp.arange(size, dtype=at.dtype)
    own_R = (places_R >= first) & (places_R < until_M[i])
    return add(made, group_M[i], at, own_R)

  def maybe(i, made):
    return lax.cond(i < ends_E[-1], step, lambda _, made: made, i, made)

  return lax.fori_loop(0, most, maybe, start)
