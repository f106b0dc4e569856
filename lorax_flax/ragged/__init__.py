"""Products of rows with the matrix of their group: a mixture's tokens and experts.

The rows of a group stand together, in the order of the groups; rows after the last
group belong to none. A product reads the matrices of the groups that have rows, and its
gradients are such products again: the matrices are neither copied nor transposed.

Shapes: N rows, E groups, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lorax_flax.ragged import blocks, masked, megablox

# Kernels by platform; elsewhere the loop over blocks of rows.
KERNELS: dict[str, Any] = {"tpu": megablox}
# Before the expected number of rows in the name stack of a compiled product.
SCOPE = "ragged_rows_"


def product(
  x_NxI: jax.Array,
  w: jax.Array,
  sizes_E: jax.Array,
  *,
  turned: bool = False,
  active: int | None = None,
) -> jax.Array:
  """Each row times its group's matrix, NxO, in x's dtype; zeros for rows of no group.

  Args:
    w: ExIxO, or ExOxI where `turned`, of x's dtype.
    sizes_E: int32, the groups' numbers of rows.
    active: number of rows that are expected in groups, by which FLOPs are counted; None
      for all.
  """
  active = x_NxI.shape[0] if active is None else active
  return product_p.bind(x_NxI, w, sizes_E, turned=turned, active=active)


def outer(
  x_NxI: jax.Array, y_NxO: jax.Array, sizes_E: jax.Array, *, active: int
) -> jax.Array:
  """The sums over each group's rows of their outer products, ExIxO, in x's dtype."""
  return outer_p.bind(x_NxI, y_NxO, sizes_E, active=active)


def groups(sizes_E: jax.Array, rows: int) -> jax.Array:
  """The group of each row, N int32; E for a row of none."""
  places = jnp.arange(rows, dtype=sizes_E.dtype)
  ends_E = jnp.cumsum(sizes_E)
  found = jnp.searchsorted(ends_E, places, side="right", method="compare_all")
  return found.astype(jnp.int32)


def flops(eqn: Any) -> int:
  """FLOPs of an equation of `product` or `outer`."""
  x, y = (v.aval.shape for v in eqn.invars[:2])
  return (
    2 * eqn.params["active"] * x[1] * (y[1] if len(y) == 2 else y[1] * y[2] // x[1])
  )


def _shaped(x: Any, *shape: int) -> Any:
  return jax.core.ShapedArray(shape, x.dtype)


def _product_shape(x, w, sizes, *, turned, active):
  del active
  contracted, kept = (2, 1) if turned else (1, 2)
  if (w.shape[0], w.shape[contracted]) != (sizes.shape[0], x.shape[1]):
    raise TypeError(f"ragged product of {x.shape} with {w.shape} in {sizes.shape}")
  return _shaped(x, x.shape[0], w.shape[kept])


def _outer_shape(x, y, sizes, *, active):
  del active
  return _shaped(x, sizes.shape[0], x.shape[1], y.shape[1])


def _tangents(bind, primals, tangents, **params):
  x, y, sizes = primals
  dx, dy, _ = tangents
  parts = [bind(dx, y, sizes, **params)] if type(dx) is not ad.Zero else []
  parts += [bind(x, dy, sizes, **params)] if type(dy) is not ad.Zero else []
  return bind(x, y, sizes, **params), sum(parts[1:], parts[0])


def _product_back(ct, x, w, sizes, *, turned, active):
  if type(ct) is ad.Zero:
    return None, None, None
  if ad.is_undefined_primal(x):
    return product(ct, w, sizes, turned=not turned, active=active), None, None
  x, ct = (ct, x) if turned else (x, ct)
  return None, outer(x, ct, sizes, active=active), None


def _outer_back(ct, x, y, sizes, *, active):
  if type(ct) is ad.Zero:
    return None, None, None
  if ad.is_undefined_primal(x):
    return product(y, ct, sizes, turned=True, active=active), None, None
  return None, product(x, ct, sizes, active=active), None


def _size(args, axes) -> int:
  return next(x.shape[i] for x, i in zip(args, axes, strict=True) if i is not None)


def _first(x: jax.Array, axis: int | None, size: int) -> jax.Array:
  """An argument with the batch as its first axis."""
  if axis is None:
    return jnp.broadcast_to(x, (size, *x.shape))
  return jnp.moveaxis(x, axis, 0)


def _order(sizes_KxE: jax.Array, rows: int, shared: bool) -> jax.Array:
  """The order of all rows of a batch in which the rows of a group stand together.

  Args:
    shared: the batch has one matrix for each group, rather than each its own.
  """
  size, count = sizes_KxE.shape
  own_KxN = jax.vmap(partial(groups, rows=rows))(sizes_KxE)
  if not shared:
    first_Kx1 = count * jnp.arange(size, dtype=jnp.int32)[:, None]
    own_KxN = jnp.where(own_KxN == count, size * count, own_KxN + first_Kx1)
  return jnp.argsort(own_KxN.reshape(-1), stable=True)


def _product_batch(args, axes, *, turned, active):
  """One product of all rows of the batch, in which a shared matrix stays one."""
  size, shared = _size(args, axes), axes[1] is None
  x_KxNxI, sizes_KxE = (_first(args[i], axes[i], size) for i in (0, 2))
  order = _order(sizes_KxE, x_KxNxI.shape[1], shared)
  w, sizes = args[1], sizes_KxE.sum(0)
  if not shared:
    w, sizes = _flat(_first(w, axes[1], size)), sizes_KxE.reshape(-1)
  x = _flat(x_KxNxI)[order]
  y = product(x, w, sizes, turned=turned, active=size * active)
  return y[jnp.argsort(order)].reshape(size, -1, y.shape[-1]), 0


def _outer_batch(args, axes, *, active):
  size = _size(args, axes)
  x, y, sizes_KxE = (_first(*pair, size) for pair in zip(args, axes, strict=True))
  order = _order(sizes_KxE, x.shape[1], shared=False)
  x, y = (_flat(t)[order] for t in (x, y))
  made = outer(x, y, sizes_KxE.reshape(-1), active=size * active)
  return made.reshape(size, -1, *made.shape[1:]), 0


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, *x.shape[2:])


def _scoped(kernel: Any, name: str) -> Any:
  """A kernel's function, under a name that tells the rows it is expected to compute.

  Where their number is a variable, it is the one of `masked`.
  """

  def run(*args, active, **params):
    chosen = kernel if isinstance(args[0].shape[0], int) else masked
    with jax.named_scope(f"{SCOPE}{active}"):
      return getattr(chosen, name)(*args, **params)

  return mlir.lower_fun(run, multiple_results=False)


def _primitive(name: str, shape: Any, back: Any, batch: Any, options: Any) -> Primitive:
  made = Primitive(f"ragged_{name}")
  made.def_impl(jax.jit(made.bind, static_argnames=options))
  made.def_abstract_eval(shape)
  ad.primitive_jvps[made] = partial(_tangents, made.bind)
  ad.primitive_transposes[made] = back
  batching.primitive_batchers[made] = batch
  mlir.register_lowering(made, _scoped(blocks, name))
  for platform, kernel in KERNELS.items():
    mlir.register_lowering(made, _scoped(kernel, name), platform=platform)
  return made


product_p = _primitive(
  "product", _product_shape, _product_back, _product_batch, ("turned", "active")
)
outer_p = _primitive("outer", _outer_shape, _outer_back, _outer_batch, ("active",))
