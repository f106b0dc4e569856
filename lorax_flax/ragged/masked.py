"""Ragged products of rows whose number is a variable, as in an exported program.

Each group's matrix meets all rows, of which its own are kept. Shapes: as in
`lorax_flax.ragged`.
"""

import jax
import jax.numpy as jnp
from jax import lax


def product(
  x_NxI: jax.Array, w: jax.Array, sizes_E: jax.Array, *, turned: bool
) -> jax.Array:
  """See `ragged.product`."""
  dims = (((1,), (1 if turned else 0,)), ((), ()))

  def add(group, y_NxO):
    own_NxO = lax.dot_general(x_NxI, w[group], dims, preferred_element_type=x_NxI.dtype)
    return jnp.where(_own(group, sizes_E, x_NxI), own_NxO, y_NxO)

  out = w.shape[1 if turned else 2]
  start = jnp.zeros((x_NxI.shape[0], out), x_NxI.dtype)
  return lax.fori_loop(0, w.shape[0], add, start)


def outer(x_NxI: jax.Array, y_NxO: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `ragged.outer`."""
  wide = jnp.promote_types(x_NxI.dtype, jnp.float32)

  def one(group):
    own_NxI = jnp.where(_own(group, sizes_E, x_NxI), x_NxI, 0)
    return jnp.einsum("NI,NO->IO", own_NxI, y_NxO, preferred_element_type=wide)

  groups_E = jnp.arange(sizes_E.shape[0], dtype=jnp.int32)
  return lax.map(one, groups_E).astype(x_NxI.dtype)


def _own(group: jax.Array, sizes_E: jax.Array, x_NxI: jax.Array) -> jax.Array:
  """Membership of each row in a group, Nx1 bool."""
  stop = jnp.cumsum(sizes_E)[group]
  places_N = jnp.arange(x_NxI.shape[0], dtype=sizes_E.dtype)
  return ((places_N >= stop - sizes_E[group]) & (places_N < stop))[:, None]
