"""Primitives that rearrange a weight: what each does to the weight's delta.

A rule maps (equation, operands, the equation's results on the values) to the results as
views. The same rules run while the roles are being found, when the factors are None and
every value is a ShapeDtypeStruct. A rule that cannot follow raises `Unsupported`.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret.view import Dim, View, is_view

NO_ROLE = Dim(frozenset(), None)


class Unsupported(Exception):
  """The rule cannot follow the weight here; the message says why."""


def _transpose(eqn, operands, out):
  return [_transposed(operands[0], jx.param(eqn, "permutation"), out[0])]


def _transposed(view: View, order: Sequence[int], value: Any) -> View:
  turn = lambda t: t.transpose((*order, len(order)))
  return view.on_all(turn, value, [view.dims[i] for i in order])


def _same(eqn, operands, out):
  """The weight as it was, in another dtype, place or name."""
  return [replace(operands[0], value=out[0])]


def _barrier(eqn, operands, out):
  """Each operand as it was; they only wait for each other."""
  pairs = zip(operands, out, strict=True)
  return [replace(x, value=y) if is_view(x) else y for x, y in pairs]


def _shift(eqn, operands, out):
  """A sum with, or a difference from, values that are no weight: W alone changes."""
  views = [x for x in operands if is_view(x)]
  if len(views) != 1 or views[0].out_scale is not None:
    raise Unsupported("a sum with a weight, or of a weight with an out_scale")
  (view,) = views
  is_taken_away = eqn.primitive.name == "sub" and is_view(operands[1])
  b = -view.b if is_taken_away and view.b is not None else view.b
  return [replace(view, value=out[0], b=b)]


def _tile(eqn, operands, out):
  (view,) = operands
  reps = jx.param(eqn, "reps")

  def on(t):
    times = [n if t.shape[i] != 1 else 1 for i, n in enumerate(reps)]
    return jnp.tile(t, (*times, 1))

  return [view.on_all(on, out[0], view.dims)]


def _cumsum(eqn, operands, out):
  """Running sums along an axis of the factor that carries it."""
  (view,) = operands
  axis = jx.param(eqn, "axis")
  if view.out_scale is not None or view.bias is not None:
    raise Unsupported("a running sum of a weight with an out_scale or a bias")
  if view.a is None:
    return [replace(view, value=out[0])]
  a, b = view.a, view.b
  if a.shape[axis] != 1 and b.shape[axis] != 1:
    raise Unsupported("a running sum along a stack axis")
  running = partial(lax.cumsum, axis=axis, reverse=jx.param(eqn, "reverse"))
  if b.shape[axis] != 1:
    return [replace(view, value=out[0], b=running(b))]
  full = (*a.shape[:axis], view.shape[axis], *a.shape[axis + 1 :])
  a = running(jnp.broadcast_to(a, full))
  return [replace(view, value=out[0], a=a)]


def _permute(eqn, operands, out):
  """Shards that change places; the factors' shards go along."""
  (view,) = operands

  def on(t):
    # A factor that is the same in every shard has nothing to exchange.
    is_replicated = jx.shards(view.value) and not jx.shards(t)
    return t if is_replicated else jx.bind(eqn, [t])[0]

  return [view.on_all(on, out[0], view.dims)]


def _convert(eqn, operands, out):
  if not jnp.issubdtype(out[0].dtype, jnp.floating):
    raise Unsupported(f"cast to {out[0].dtype}")
  return _same(eqn, operands, out)


def reshape_groups(old: Sequence[int], new: Sequence[int]):
  """Splits a reshape into the least groups of axes whose products agree.

  >>> reshape_groups((6, 4), (2, 3, 4))
  [([0], [0, 1]), ([1], [2])]
  """
  groups, i, j = [], 0, 0
  while i < len(old) or j < len(new):
    left: list[int] = []
    right: list[int] = []
    p = q = 1
    while p != q or not (left or right):
      if (p <= q and i < len(old)) or j == len(new):
        p, left, i = p * old[i], [*left, i], i + 1
      else:
        q, right, j = q * new[j], [*right, j], j + 1
    groups.append((left, right))
  return groups


def _reshape(eqn, operands, out):
  view, shape = operands[0], tuple(out[0].shape)
  order = jx.param(eqn, "dimensions")
  if order is not None:
    turned = jax.ShapeDtypeStruct([view.shape[i] for i in order], view.dtype)
    view = _transposed(view, order, turned)
  groups = reshape_groups(view.shape, shape)
  dims: list[Dim] = [NO_ROLE] * len(shape)
  for left, right in groups:
    roles = view.roles_of(left)
    if len(roles) > 1:
      raise Unsupported(
        f"a reshape of {view.shape} to {shape} that merges {roles} axes"
      )
    labels = frozenset().union(*(view.dims[i].labels for i in left))
    role = roles.pop() if roles else None
    for j in right:
      if shape[j] != 1 or len(right) == 1:
        dims[j] = Dim(labels, role)

  def on(t):
    sizes = list(t.shape)
    target = [1] * len(shape)
    for left, right in groups:
      if any(t.shape[i] != 1 for i in left):
        for i in left:
          sizes[i] = view.shape[i]
        for j in right:
          target[j] = shape[j]
    return jnp.broadcast_to(t, sizes).reshape((*target, t.shape[-1]))

  return [view.on_all(on, out[0], dims)]


def _broadcast(eqn, operands, out):
  view, shape = operands[0], tuple(out[0].shape)
  where = jx.param(eqn, "broadcast_dimensions")
  dims = [NO_ROLE] * len(shape)
  for i, j in enumerate(where):
    if view.shape[i] == shape[j]:
      dims[j] = view.dims[i]

  def on(t):
    target = [1] * len(shape)
    for i, j in enumerate(where):
      target[j] = t.shape[i]
    return t.reshape((*target, t.shape[-1]))

  return [view.on_all(on, out[0], dims)]


def _squeeze(eqn, operands, out):
  (view,) = operands
  gone = {d % len(view.dims) for d in jx.param(eqn, "dimensions")}
  return [_without(view, gone, out[0])]


def _without(view: View, gone: Collection[int], out) -> View:
  """A view without these axes, of size 1 each."""
  dims = [d for i, d in enumerate(view.dims) if i not in gone]
  return view.on_all(lambda t: t.squeeze(tuple(gone)), out, dims)


def _at(view: View, axis: int, start: Any) -> Any:
  """The index of one place on a stack axis, so that dropout tells layers apart."""
  if view.index is None or view.dims[axis].role not in ("stack", None):
    return view.index
  return view.index * view.shape[axis] + jnp.int32(start)


def _slice_axes(view: View, starts, sizes, cut: Callable, out) -> View:
  """A slice on some axes: of each factor, the axes that it carries.

  Args:
    cut: (factor, axis) to its slice on that axis.
  """
  axes = [i for i, n in enumerate(view.shape) if sizes[i] != n]
  if view.bias is not None and any(view.dims[i].role == "in" for i in axes):
    raise Unsupported("a part of its inputs, where it has a bias of its own")

  def on(t):
    for i in axes:
      if t.shape[i] != 1:
        t = cut(t, i)
    return t

  sliced = view.on_all(on, out, view.dims)
  for i in axes:
    if sizes[i] == 1:
      sliced = replace(sliced, index=_at(view, i, starts[i]))
  return sliced


def _part(view: View, axis: int, start: int, size: int, out) -> View:
  """A slice on one axis."""

  def cut(t, i):
    return lax.slice_in_dim(t, start, start + size, axis=i)

  starts = [start if i == axis else 0 for i in range(len(view.dims))]
  sizes = [size if i == axis else n for i, n in enumerate(view.shape)]
  return _slice_axes(view, starts, sizes, cut, out)


def _slice(eqn, operands, out):
  (view,) = operands
  steps = jx.param(eqn, "strides") or (1,) * len(view.dims)
  starts, stops = jx.param(eqn, "start_indices"), jx.param(eqn, "limit_indices")

  def cut(t, i):
    return lax.slice_in_dim(t, starts[i], stops[i], steps[i], i)

  return [_slice_axes(view, starts, out[0].shape, cut, out[0])]


def looked_up(view: View, axes: Sequence[int]) -> Dim | None:
  """The mark of a view whose places on these axes are chosen by index.

  Raises:
    Unsupported: axes of different roles, or rows of which places are chosen again.
  """
  roles = {view.dims[i].role for i in axes} - {None}
  if len(roles) > 1:
    raise Unsupported(f"a look-up on axes with the roles {sorted(map(str, roles))}")
  labels = frozenset().union(*(view.dims[i].labels for i in axes))
  before = view.looked_up
  if before is not None and not labels <= before.labels:
    rest = [d for d in view.dims if d.labels and not d.labels <= before.labels | labels]
    if len(rest) < 2 or roles - {before.role}:
      raise Unsupported("a look-up of a part of each row")
    labels |= before.labels
  if "in" in roles and view.bias is not None:
    raise Unsupported("a look-up of its inputs, where it has a bias of its own")
  # Of a stack, full kernels are chosen: these are never rows of a table.
  return before if roles <= {"stack"} else Dim(labels, *roles)


def _dynamic_slice(eqn, operands, out):
  view, *starts = operands
  if not is_view(view) or any(map(is_view, starts)):
    raise Unsupported("a weight used as an index")
  sizes = jx.param(eqn, "slice_sizes")

  def cut(t, i):
    return lax.dynamic_slice_in_dim(t, starts[i], sizes[i], i)

  sliced = _slice_axes(view, starts, sizes, cut, out[0])
  one = [i for i, n in enumerate(view.shape) if sizes[i] == 1 != n]
  # One place on some axes is a look-up, as a gather of one row is.
  if not one or all(n == 1 for n in sizes):
    return [sliced]
  return [replace(sliced, looked_up=looked_up(view, one))]


def _split(eqn, operands, out):
  (view,) = operands
  axis, offset, parts = jx.param(eqn, "axis"), 0, []
  for value, size in zip(out, jx.param(eqn, "sizes"), strict=True):
    parts.append(_part(view, axis, offset, size, value))
    offset += size
  return parts


def _unstack(eqn, operands, out):
  """The places of an axis, each without it: what a loop over an array makes."""
  (view,) = operands
  axis = jx.param(eqn, "axis")
  places = (_part(view, axis, i, 1, value) for i, value in enumerate(out))
  return [_without(x, {axis}, value) for x, value in zip(places, out, strict=True)]


def _rev(eqn, operands, out):
  (view,) = operands
  axes = jx.param(eqn, "dimensions")
  return [view.on_all(lambda t: lax.rev(t, axes), out[0], view.dims)]


def _scaled(eqn, operands, out):
  """A product with, or a quotient by, values that are no weight."""
  is_quotient = eqn.primitive.name == "div"
  view, other = operands if is_view(operands[0]) else operands[::-1]
  if is_view(other) or (is_quotient and not is_view(operands[0])):
    raise Unsupported("a product with a weight, or a quotient by one")
  factor = lambda: 1.0 / _float(other) if is_quotient else _float(other)
  return [_times(view, other, factor, out[0])]


def _select(eqn, operands, out):
  """A weight where a mask chooses it, and values that are no weight elsewhere."""
  which, *cases = operands
  ((number, view), *others) = ((i, x) for i, x in enumerate(cases) if is_view(x))
  if is_view(which) or others or view.out_scale is not None:
    raise Unsupported("a choice among weights, or of a weight with an out_scale")
  factor = lambda: _float(jnp.asarray(which, jnp.int32) == number)
  return [_times(view, which, factor, out[0])]


def _float(x: Any) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def _times(view: View, other: Any, factor: Callable[[], jax.Array], value) -> View:
  """The delta times a factor of the shape of `other`, elementwise.

  It stays of low rank where the factor varies along axes of one role alone, and along
  stack axes. Of axes without a role yet, all of them are inputs and outputs.
  """
  shape = tuple(getattr(other, "shape", ())) or (1,) * len(view.dims)
  axes = [i for i, n in enumerate(shape) if n != 1]
  held = [i for i, d in enumerate(view.dims) if d.labels and view.shape[i] != 1]
  roles = view.roles_of(axes) - {"stack", "?"}
  if not set(axes) <= set(held):
    raise Unsupported("elementwise with an array along an axis that the weight lacks")
  if len(roles) > 1 or (len(axes) > 1 and axes == held):
    raise Unsupported("elementwise with an array that varies along inputs and outputs")
  if view.b is None:
    return replace(view, value=value)
  by = factor().reshape((*shape, 1))
  parts = {"a": view.a * by} if roles == {"in"} else {"b": view.b * by}
  return replace(view, value=value, **parts)


def _neg(eqn, operands, out):
  (view,) = operands
  return [replace(view, value=out[0], b=None if view.b is None else -view.b)]


def _concatenate(eqn, operands, out):
  return _join(operands, jx.param(eqn, "dimension"), out)


def _stack(eqn, operands, out):
  axis = jx.param(eqn, "axis")

  def expanded(x):
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    value = jax.ShapeDtypeStruct(shape, x.dtype)
    if not is_view(x):
      return value
    dims = (*x.dims[:axis], NO_ROLE, *x.dims[axis:])
    return x.on_all(lambda t: jnp.expand_dims(t, axis), value, dims)

  return _join([expanded(x) for x in operands], axis, out)


def _join(operands, axis, out):
  """Weights side by side: their ranks stand side by side as well."""
  operands = [x.chosen() if is_view(x) else x for x in operands]
  views = [v for v in operands if is_view(v)]
  dims = []
  for i in range(len(out[0].shape)):
    met = {v.dims[i].role for v in views if v.dims[i].role is not None}
    if len(met) > 1:
      raise Unsupported(f"a concatenation of axes with the roles {sorted(met)}")
    labels = frozenset().union(*(v.dims[i].labels for v in views))
    dims.append(Dim(labels, met.pop() if met else None))
  first = views[0]
  if first.a is None:
    return [replace(first, value=out[0], dims=tuple(dims))]
  along_in = dims[axis].role == "in"
  if along_in and any(v.out_scale is not None or v.bias is not None for v in views):
    raise Unsupported("a join of the inputs of weights with an out_scale or a bias")
  stacked = dims[axis].role in ("stack", None)
  if dims[axis].role is None:
    dims[axis] = Dim(frozenset(), "stack")
  total = (
    max(v.a.shape[-1] for v in views) if stacked else sum(v.a.shape[-1] for v in views)
  )
  a = _side_by_side([v.a for v in views], operands, axis, dims, total, stacked, "in")
  b = _side_by_side([v.b for v in views], operands, axis, dims, total, stacked, "out")
  out_scale = _ones_beside([v.out_scale for v in views], operands, axis, dims, 1.0)
  bias = _ones_beside([v.bias for v in views], operands, axis, dims, 0.0)
  return [replace(first.with_parts((out[0], a, b, out_scale, bias)), dims=tuple(dims))]


def _ones_beside(given, operands, axis, dims, fill):
  """The out_scale or the bias of a concatenation, `fill` where an operand has none."""
  if all(t is None for t in given):
    return None
  remaining, parts = iter(given), []
  shapes = [t.shape[:-1] for t in given if t is not None]
  common = [max(shape[i] for shape in shapes) for i in range(len(shapes[0]))]
  for operand in operands:
    t = next(remaining) if is_view(operand) else None
    shape = [operand.shape[axis] if i == axis else n for i, n in enumerate(common)]
    t = jnp.full((1,) * (len(shape) + 1), fill) if t is None else t
    parts.append(jnp.broadcast_to(t, (*shape, 1)))
  return jnp.concatenate(parts, axis=axis)


def _side_by_side(factors, operands, axis, dims, total, stacked, carrier):
  """One factor of a concatenation, zero where an operand has no delta.

  Along a stack axis the operands share the rank axis, padded to the largest; along an
  axis that one factor carries, each operand has its own stretch of it.
  """
  remaining, offset, parts = iter(factors), 0, []
  common = [max(f.shape[i] for f in factors) for i in range(factors[0].ndim - 1)]
  along = (
    stacked or dims[axis].role == carrier or any(f.shape[axis] != 1 for f in factors)
  )
  for operand in operands:
    size = operand.shape[axis] if along else 1
    shape = [size if i == axis else n for i, n in enumerate(common)]
    if not is_view(operand):
      if along:
        parts.append(jnp.zeros((*shape, total), factors[0].dtype))
      continue
    t = next(remaining)
    rank = t.shape[-1]
    t = jnp.broadcast_to(t, (*shape, rank))
    before = 0 if stacked else offset
    pad = [(0, 0)] * (t.ndim - 1)
    if along:
      parts.append(jnp.pad(t, [*pad, (before, total - before - rank)]))
    else:
      parts.append(t)
    offset += rank
  return jnp.concatenate(parts, axis=axis if along else -1)


def _pad(eqn, operands, out):
  """A weight among constants; the delta is zero there."""
  view, filler = operands
  if not is_view(view) or is_view(filler):
    raise Unsupported("a weight used as padding")
  config = jx.param(eqn, "padding_config")
  axes = [i for i, how in enumerate(config) if tuple(how) != (0, 0, 0)]
  if any(view.dims[i].role == "in" for i in axes) and (
    view.out_scale is not None or view.bias is not None
  ):
    raise Unsupported("padding of the inputs of a weight with an out_scale or a bias")
  if view.a is None:
    return [replace(view, value=out[0])]

  def padded(t, fill, full=()):
    sizes = [view.shape[i] if i in full else n for i, n in enumerate(t.shape)]
    t = jnp.broadcast_to(t, sizes)
    how = [c if t.shape[i] != 1 or i in full else (0, 0, 0) for i, c in with_rank]
    return lax.pad(t, jnp.asarray(fill, t.dtype), how)

  with_rank = list(enumerate([*config, (0, 0, 0)]))
  # Where neither factor carries an axis, one of them must, to end at its edges.
  free = [i for i in axes if view.a.shape[i] == view.b.shape[i] == 1]
  out_scale, bias = (
    None if t is None else padded(t, fill, axes)
    for t, fill in ((view.out_scale, 1.0), (view.bias, 0.0))
  )
  parts = (out[0], padded(view.a, 0.0, free), padded(view.b, 0.0), out_scale, bias)
  return [view.with_parts(parts)]


def _reduce_sum(eqn, operands, out):
  """A sum over axes that one factor carries, or none; needs the roles."""
  (view,) = operands
  axes = [i for i in jx.param(eqn, "axes") if view.shape[i] != 1]
  if view.a is None and axes:
    raise Unsupported("a sum over its axes")
  if view.bias is not None or (view.out_scale is not None and axes):
    raise Unsupported("a sum of a weight with an out_scale or a bias")
  gone = tuple(jx.param(eqn, "axes"))
  dims = [d for i, d in enumerate(view.dims) if i not in gone]
  if view.a is None:
    return [replace(view, value=out[0], dims=tuple(dims))]
  if any(view.a.shape[i] != 1 and view.b.shape[i] != 1 for i in axes):
    raise Unsupported("a sum over a stack axis")
  free = [i for i in axes if view.a.shape[i] == view.b.shape[i] == 1]
  times = math.prod(view.shape[i] for i in free)
  a, b = view.a.sum(gone), view.b.sum(gone) * jnp.float32(times)
  return [replace(view.with_parts((out[0], a, b, None, None)), dims=tuple(dims))]


def _all_gather(eqn, operands, out):
  """A weight gathered from its shards inside a shard_map."""
  (view,) = operands
  axis = jx.param(eqn, "all_gather_dimension")
  if not jx.param(eqn, "tiled"):
    raise Unsupported("an all_gather that adds an axis")

  def on(t):
    return jx.bind(eqn, [t])[0] if t.shape[axis] != 1 else t

  return [view.on_all(on, out[0], view.dims)]


def _vary(eqn, operands, out):
  """Marks a value as varying over mesh axes; the factors then vary as well."""
  (view,) = operands
  return [view.on_all(lambda t: jx.bind(eqn, [t])[0], out[0], view.dims)]


RULES: dict[str, Callable[[Any, list, list], list[View]]] = {
  "add": _shift,
  "all_gather": _all_gather,
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "convert_element_type": _convert,
  "copy": _same,
  "copy_p": _same,
  "cumsum": _cumsum,
  "div": _scaled,
  "dynamic_slice": _dynamic_slice,
  "mul": _scaled,
  "name": _same,
  "neg": _neg,
  "optimization_barrier": _barrier,
  "pad": _pad,
  "pcast": _vary,
  "ppermute": _permute,
  "pvary": _vary,
  "reduce_precision": _same,
  "reduce_sum": _reduce_sum,
  "reshape": _reshape,
  "reshard": _same,
  "rev": _rev,
  "select_n": _select,
  "sharding_constraint": _same,
  "slice": _slice,
  "split": _split,
  "squeeze": _squeeze,
  "stack": _stack,
  "stop_gradient": _vary,
  "sub": _shift,
  "tile": _tile,
  "transpose": _transpose,
  "unstack": _unstack,
}

# Those that are given other operands without the axes along which these are constant.
ELEMENTWISE = {"div", "mul", "select_n"}

# Those that follow a weight only where other operands, but scalars, are constants.
WITH_CONSTANTS = {"add", "concatenate", "div", "mul", "pad", "select_n", "stack", "sub"}
