"""Products of rows with the matrix of their group: a mixture's tokens and experts.

The rows of a group stand together, in the order of the groups; rows after the last
group belong to none. A product reads the matrices of the groups that have rows, and its
gradients are such products again: the matrices are neither copied nor transposed. Rows
in another order are sorted for it, under `vmap` those of all examples together.

Shapes: N rows, E groups, I inputs, O outputs.
"""

from functools import partial
from typing import Any, NamedTuple

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
  return product_p.bind(x_NxI, w, sizes_E, turned=turned, active=active, ordered=True)


def product_of(x_NxI: jax.Array, w_ExIxO: jax.Array, own_N: jax.Array) -> jax.Array:
  """`product` of rows in any order, zeros for those of no group.

  Args:
    own_N: int32, the group of each row; negative or from E on for none.
  """
  rows = x_NxI.shape[0]
  return product_p.bind(x_NxI, w_ExIxO, own_N, turned=False, active=rows, ordered=False)


def groups(sizes_E: jax.Array, rows: int) -> jax.Array:
  """The group of each row, N int32; E for a row of none."""
  places = jnp.arange(rows, dtype=sizes_E.dtype)
  return jnp.searchsorted(jnp.cumsum(sizes_E), places, side="right").astype(jnp.int32)


def flops(eqn: Any) -> int:
  """FLOPs of an equation of `product` or `outer`."""
  x, y = (v.aval.shape for v in eqn.invars[:2])
  return (
    2 * eqn.params["active"] * x[1] * (y[1] if len(y) == 2 else y[1] * y[2] // x[1])
  )


def _shaped(x: Any, *shape: int) -> Any:
  return jax.core.ShapedArray(shape, x.dtype)


def _product_shape(x, w, which, *, turned, active, ordered):
  del active
  contracted, kept = (2, 1) if turned else (1, 2)
  sizes = (w.shape[0] if ordered else x.shape[0]), w.shape[contracted]
  if sizes != (which.shape[0], x.shape[1]):
    raise TypeError(f"ragged product of {x.shape} with {w.shape} in {which.shape}")
  return _shaped(x, x.shape[0], w.shape[kept])


def _outer_shape(x, y, which, *, count, active, ordered):
  """The sums over each group's rows of their outer products, ExIxO, in x's dtype."""
  del which, active, ordered
  return _shaped(x, count, x.shape[1], y.shape[1])


def _tangents(bind, primals, tangents, **params):
  x, y, sizes = primals
  dx, dy, _ = tangents
  parts = [bind(dx, y, sizes, **params)] if type(dx) is not ad.Zero else []
  parts += [bind(x, dy, sizes, **params)] if type(dy) is not ad.Zero else []
  return bind(x, y, sizes, **params), sum(parts[1:], parts[0])


def _product_back(ct, x, w, which, *, turned, **params):
  if type(ct) is ad.Zero:
    return None, None, None
  if ad.is_undefined_primal(x):
    return product_p.bind(ct, w, which, turned=not turned, **params), None, None
  x, ct = (ct, x) if turned else (x, ct)
  return None, outer_p.bind(x, ct, which, count=w.aval.shape[0], **params), None


def _outer_back(ct, x, y, which, *, count, **params):
  del count
  if type(ct) is ad.Zero:
    return None, None, None
  if ad.is_undefined_primal(x):
    return product_p.bind(y, ct, which, turned=True, **params), None, None
  return None, product_p.bind(x, ct, which, turned=False, **params), None


def _size(args, axes) -> int:
  return next(x.shape[i] for x, i in zip(args, axes, strict=True) if i is not None)


def _first(x: jax.Array, axis: int | None, size: int) -> jax.Array:
  """An argument with the batch as its first axis."""
  if axis is None:
    return jnp.broadcast_to(x, (size, *x.shape))
  return jnp.moveaxis(x, axis, 0)


def _own(which: jax.Array, rows: int, count: int, ordered: bool) -> jax.Array:
  """The group of each row of a batch, KxN; `count` for none."""
  if ordered:
    return jax.vmap(partial(groups, rows=rows))(which)
  return jnp.where((which >= 0) & (which < count), which, count)


def _apart(own_KxN: jax.Array, count: int) -> jax.Array:
  """The groups of a batch, each of whose examples has `count` of its own."""
  size = own_KxN.shape[0]
  first_Kx1 = count * jnp.arange(size, dtype=jnp.int32)[:, None]
  return jnp.where(own_KxN == count, size * count, own_KxN + first_Kx1)


def _product_batch(args, axes, *, turned, active, ordered):
  """One product of all rows of the batch, in which a shared matrix stays one."""
  size, shared = _size(args, axes), axes[1] is None
  x_KxNxI, which = (_first(args[i], axes[i], size) for i in (0, 2))
  w = args[1] if shared else _first(args[1], axes[1], size)
  count = w.shape[0 if shared else 1]
  own_KxN = _own(which, x_KxNxI.shape[1], count, ordered)
  if not shared:
    w, own_KxN = _flat(w), _apart(own_KxN, count)
  options = {"turned": turned, "active": size * active, "ordered": False}
  y = product_p.bind(_flat(x_KxNxI), w, _flat(own_KxN), **options)
  return y.reshape(size, -1, y.shape[-1]), 0


def _outer_batch(args, axes, *, count, active, ordered):
  size = _size(args, axes)
  x, y, which = (_first(*pair, size) for pair in zip(args, axes, strict=True))
  own_KxN = _apart(_own(which, x.shape[1], count, ordered), count)
  options = {"count": size * count, "active": size * active, "ordered": False}
  made = outer_p.bind(_flat(x), _flat(y), _flat(own_KxN), **options)
  return made.reshape(size, -1, *made.shape[1:]), 0


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, *x.shape[2:])


class _InOrder(NamedTuple):
  """The order in which the rows of a group stand together, and the groups' sizes."""

  order_N: jax.Array
  sizes_E: jax.Array

  @classmethod
  def of(cls, own_N: jax.Array, count: int) -> "_InOrder":
    own_N = _own(own_N, len(own_N), count, ordered=False)
    sizes_E = jnp.bincount(own_N, length=count).astype(jnp.int32)
    return cls(jnp.argsort(own_N, stable=True), sizes_E)


def _product_by(run, x, w, which, *, turned, ordered):
  if ordered:
    return run(x, w, which, turned=turned)
  order_N, sizes_E = _InOrder.of(which, w.shape[0])
  return run(x[order_N], w, sizes_E, turned=turned)[jnp.argsort(order_N)]


def _outer_by(run, x, y, which, *, count, ordered):
  if ordered:
    return run(x, y, which)
  order_N, sizes_E = _InOrder.of(which, count)
  return run(x[order_N], y[order_N], sizes_E)


def _scoped(kernel: Any, by: Any, name: str) -> Any:
  """A kernel's function, under a name that tells the rows it is expected to compute.

  Where their number is a variable, it is the one of `masked`.
  """

  def run(*args, active, **params):
    chosen = kernel if isinstance(args[0].shape[0], int) else masked
    with jax.named_scope(f"{SCOPE}{active}"):
      return by(getattr(chosen, name), *args, **params)

  return mlir.lower_fun(run, multiple_results=False)


def _primitive(
  name: str, shape: Any, back: Any, batch: Any, by: Any, option: str
) -> Primitive:
  made = Primitive(f"ragged_{name}")
  options = option, "active", "ordered"
  made.def_impl(jax.jit(made.bind, static_argnames=options))
  made.def_abstract_eval(shape)
  ad.primitive_jvps[made] = partial(_tangents, made.bind)
  ad.primitive_transposes[made] = back
  batching.primitive_batchers[made] = batch
  mlir.register_lowering(made, _scoped(blocks, by, name))
  for platform, kernel in KERNELS.items():
    mlir.register_lowering(made, _scoped(kernel, by, name), platform=platform)
  return made


product_p = _primitive(
  "product", _product_shape, _product_back, _product_batch, _product_by, "turned"
)
outer_p = _primitive(
  "outer", _outer_shape, _outer_back, _outer_batch, _outer_by, "count"
)
