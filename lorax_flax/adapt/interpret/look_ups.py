"""Look-ups: rows of a weight chosen by index, followed until they are consumed.

A gather only rearranges a weight: from a stack it chooses full kernels, of a kernel it
picks rows or columns, and a product then consumes what it chose. Rows of a table are
data instead: where they are used, base + delta is formed, at the activations' size.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret import layout_rules, product_rules
from lorax_flax.adapt.interpret.layout_rules import Unsupported, looked_up
from lorax_flax.adapt.interpret.view import Dim, View, is_view


def _gather(eqn, operands, out):
  """The rows chosen, of each factor that carries the axes that are looked up."""
  view, indices = operands
  if not is_view(view):
    raise Unsupported("a weight used as an index")
  d, n_out = jx.param(eqn, "dimension_numbers"), len(out[0].shape)
  shared, sizes = tuple(d.operand_batching_dims), jx.param(eqn, "slice_sizes")
  # An axis that is taken in full is not looked up, whatever its index (a vmapped
  # dynamic_slice has one for every axis).
  full = {i for i, n in enumerate(view.shape) if sizes[i] == n}
  looked = [i for i in d.start_index_map if sizes[i] == 1 and i not in full]
  looked += [i for i in d.collapsed_slice_dims if i not in looked]
  offset = [i for i in range(len(sizes)) if i not in (*d.collapsed_slice_dims, *shared)]
  if any(i not in (*looked, *shared) for i in range(len(sizes)) if i not in full):
    raise Unsupported("a look-up of a part of each row")
  chosen = looked_up(view, looked) if looked else view.looked_up
  rows = [i for i in range(n_out) if i not in d.offset_dims]
  labels = frozenset().union(*(view.dims[i].labels for i in looked))
  role = next((view.dims[i].role for i in looked if view.dims[i].role), None)
  dims = [Dim(labels, role)] * n_out
  places = [*zip(d.offset_dims, offset, strict=True)]
  batching = zip(d.start_indices_batching_dims, shared, strict=True)
  places += [(rows[j], i) for j, i in batching]
  for place, i in places:
    dims[place] = Dim(view.dims[i].labels, "stack") if i in shared else view.dims[i]
  carried = {i for i in (*looked, *shared) if view.shape[i] != 1}

  def on(t):
    if all(t.shape[i] == 1 for i in looked):
      return _placed(t, sorted(places), d.collapsed_slice_dims, n_out)
    # A joined weight may have a stack axis that one part alone carries.
    sizes = [view.shape[i] if i in carried else n for i, n in enumerate(t.shape)]
    return _rows(eqn, jnp.broadcast_to(t, sizes), indices)

  return [replace(view.on_all(on, out[0], dims), looked_up=chosen)]


def _placed(t: jax.Array, places, gone, n_out: int) -> jax.Array:
  """A factor without the looked-up axes, its axes where the result has them."""
  t = t.transpose((*(i for _, i in places), *gone, t.ndim - 1))
  shape = [1] * n_out
  for (place, _), size in zip(places, t.shape, strict=False):
    shape[place] = size
  return t.reshape((*shape, t.shape[-1]))


def _rows(eqn, t, indices) -> jax.Array:
  """The gather of a factor, whose last axis is the rank's."""
  d = jx.param(eqn, "dimension_numbers")
  numbers = d._replace(offset_dims=(*d.offset_dims, len(eqn.outvars[0].aval.shape)))
  sizes = map(min, (*jx.param(eqn, "slice_sizes"), t.shape[-1]), t.shape)
  return jx.bind(eqn, [t, indices], dimension_numbers=numbers, slice_sizes=(*sizes,))[0]


# The rules that follow a weight from one place to the next.
RULES = layout_rules.RULES | {"gather": _gather}

# Those that follow what was looked up; any other step takes it for data.
_MOVES = {
  "broadcast_in_dim",
  "convert_element_type",
  "copy",
  "div",
  "dynamic_slice",
  "gather",
  "mul",
  "name",
  "pcast",
  "pvary",
  "reshape",
  "rev",
  "slice",
  "split",
  "squeeze",
  "transpose",
  "unstack",
}


def index_axes(view: View) -> set[int]:
  """The axes of the indices by which a view was looked up."""
  looked = view.looked_up.labels if view.looked_up else frozenset()
  return {i for i, d in enumerate(view.dims) if d.labels and d.labels <= looked}


def row_axes(view: View) -> set[int]:
  """The axes of a row, or of a kernel, that was looked up."""
  labelled = {i for i, d in enumerate(view.dims) if d.labels and view.shape[i] != 1}
  return labelled - index_axes(view)


def is_table(view: View) -> bool:
  """True where what was looked up may be rows of a table.

  While roles are being found, more than one axis of a row tells a stack of kernels.
  """
  looked = view.looked_up
  return looked is not None and (looked.role != "?" or len(row_axes(view)) <= 1)


def data(eqn: Any, operands: Sequence[Any], moves: bool = False) -> set[int]:
  """The operands that were looked up and are data to this equation, by number.

  Discovery and evaluation both ask here.

  Args:
    moves: whether another operand depends on the inputs; asked while roles are being
      found, and told by the roles afterwards.
  """
  views = [i for i, x in enumerate(operands) if is_view(x)]
  looked = {i for i in views if operands[i].looked_up is not None}
  tables = {i for i in looked if is_table(operands[i])}
  name, call = eqn.primitive.name, jx.call(eqn)
  if not looked or (isinstance(call, jx.Call) and call.is_inline):
    return set()
  if call is not None:
    return tables
  if name in product_rules.RULES:
    if len(views) > 1:
      return looked
    return looked if _is_row(eqn, operands, moves) else set()
  indexed = name in ("dynamic_slice", "gather")
  alone = indexed or not any(
    getattr(x, "ndim", len(getattr(x, "shape", ()))) for x in _others(operands)
  )
  if name in _MOVES and alone:
    return set()
  return looked if moves else tables


def _others(operands):
  return [x for x in operands if not is_view(x)]


def _is_row(eqn, operands, moves) -> bool:
  """True where a product takes what was looked up for rows of data, not a kernel."""
  (view,) = (x for x in operands if is_view(x))
  axes, index, row = (
    product_rules.axes_of(eqn, operands),
    index_axes(view),
    row_axes(view),
  )
  contracted, kept = set(axes.contracted), set(axes.kept)
  if index & contracted:
    return not (index <= contracted and row & kept)
  if view.looked_up.role != "?":
    return view.looked_up.role == "in"
  has_outputs = row & kept or (index and index <= kept)
  return not (moves and has_outputs)


def chosen(view: View, axes: product_rules.Axes) -> set[int]:
  """The axes of the indices where a product takes a kernel for each."""
  index = index_axes(view)
  others = row_axes(view) & set(axes.kept)
  return index if others and not index <= set(axes.contracted) else set()
