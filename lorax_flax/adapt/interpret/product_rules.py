"""Primitives that consume a weight: x W becomes out_scale * (x W + (x a) b) + bias.

Each has two halves: `axes_of`, which axes of the weight the primitive contracts, shares
with x, and keeps (this is how roles are found), and a product rule. A rule is given
`product`, the primitive as a function of x with W itself, and adds the delta's part;
and `observe`, which sees each product with the contracted factor, or None.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_flax import devices, ragged
from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret import evaluations
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.interpret.view import View, is_view
from lorax_flax.methods.parts import dense
from lorax_flax.methods.slots import Choice


class Axes(NamedTuple):
  """Axes of a weight by what a primitive does with them.

  Attributes:
    window: of a convolution; it is contracted, and either factor may carry it.
  """

  contracted: tuple[int, ...]
  shared: tuple[int, ...]
  kept: tuple[int, ...]
  window: tuple[int, ...] = ()


def axes_of(eqn: Any, operands: list[Any]) -> Axes:
  """Sorts the axes of the one view among a contraction's operands."""
  where = [i for i, x in enumerate(operands) if is_view(x)]
  if len(where) != 1:
    raise Unsupported("a product of two adapted weights")
  n, name = len(operands[where[0]].dims), eqn.primitive.name
  window: tuple[int, ...] = ()
  if name == "dot_general":
    contract, batch = jx.param(eqn, "dimension_numbers")
    contracted, shared = tuple(contract[where[0]]), tuple(batch[where[0]])
  elif where[0] != 1:
    raise Unsupported("a weight in the place of the input")
  elif name == "ragged_product":
    contracted, shared = ((2,) if jx.param(eqn, "turned") else (1,)), (0,)
  else:
    numbers = jx.param(eqn, "dimension_numbers")
    contracted, shared = (numbers.rhs_spec[1],), ()
    window = tuple(numbers.rhs_spec[2:])
    if jx.param(eqn, "batch_group_count") != 1:
      raise Unsupported("batch_group_count")
  kept = tuple(i for i in range(n) if i not in (*contracted, *shared, *window))
  if not contracted:
    raise Unsupported("a product that contracts nothing")
  return Axes(contracted, shared, kept, window)


def site(eqn: Any) -> str:
  """The name of a product: its primitive's, but for depthwise convolutions.

  These hold no matrix for each channel, and "all-linear" leaves them out.
  """
  name = eqn.primitive.name
  if name != "conv_general_dilated" or jx.param(eqn, "feature_group_count") == 1:
    return name
  inputs = jx.param(eqn, "dimension_numbers").rhs_spec[1]
  return "depthwise convolution" if eqn.invars[1].aval.shape[inputs] == 1 else name


class _Factors(NamedTuple):
  """The factors of a delta as a product meets them.

  Attributes:
    contracted: carries the axes that the primitive contracts.
    turned: whether these are the outputs: a tied weight, used the other way round.
  """

  contracted: jax.Array
  other: jax.Array
  turned: bool


def _factors(view: View, axes: Axes) -> _Factors:
  met = view.roles_of(axes.contracted)
  turned = met == {"out"}
  if not turned and not met <= {"in"}:
    raise Unsupported(f"a product that contracts axes with the roles {sorted(met)}")
  contracted, other = (view.b, view.a) if turned else (view.a, view.b)

  def carries(t):
    return any(t.shape[i] != 1 for i in axes.contracted)

  if carries(other) and not carries(contracted):  # one factor is the dense delta
    contracted, other = other, contracted
  if carries(other):
    raise Unsupported("a product that contracts a stack axis")
  return _Factors(contracted, other, turned)


def _named(t: jax.Array, letters: list[str]) -> tuple[jax.Array, str]:
  """Drops the axes that a factor does not carry; the rest by letter, and z for r."""
  keep = [i for i in range(t.ndim - 1) if t.shape[i] != 1]
  shape = [t.shape[i] for i in keep] + [t.shape[-1]]
  return t.reshape(shape), "".join(letters[i] for i in keep) + "z"


def _sum(base: Any, y: jax.Array) -> jax.Array:
  """base + y; y alone where only a change of the weight is multiplied."""
  y = y.astype(base.dtype)
  return y if isinstance(base, jax.ShapeDtypeStruct) else base + y


def _placed(t: jax.Array, letters: list[str], names: Sequence[str]) -> jax.Array:
  """An out_scale or a bias, its axes named by `letters`, to broadcast over `names`."""
  held = [i for i in range(t.ndim - 1) if t.shape[i] != 1]
  if not {letters[i] for i in held} <= set(names):
    raise Unsupported(
      "an out_scale or a bias on an axis that the product does not have"
    )
  held.sort(key=lambda i: names.index(letters[i]))
  t = t.transpose((*held, *(i for i in range(t.ndim) if i not in held)))
  sizes = {letters[i]: n for i, n in zip(held, t.shape, strict=False)}
  return t.reshape([sizes.get(name, 1) for name in names])


def _scales_input(view: View, contracted: Sequence[int]) -> bool:
  """True where the out_scale is on axes that a product contracts."""
  scale = view.out_scale
  return scale is not None and any(scale.shape[i] != 1 for i in contracted)


def _finished(y: jax.Array, view: View, place: Callable, scaled=False) -> jax.Array:
  """out_scale * y + bias, for a product that keeps the axes that they carry.

  Args:
    scaled: the inputs were, and not the result is.
  """
  if view.out_scale is not None and not scaled:
    y = y * place(view.out_scale).astype(y.dtype)
  if view.bias is not None:
    y = y + place(view.bias).astype(y.dtype)
  return y


def _kept(base: jax.Array, x: jax.Array, dropped: jax.Array, view: View, product):
  """The base's product as two: one that stays as it is, and one that the delta changes.

  Dropout acts on all that a delta adds, and an out_scale adds to the base's product
  too: (out_scale - 1) x W (arXiv 2402.09353, as PEFT computes it).
  """
  alone = isinstance(base, jax.ShapeDtypeStruct)
  if alone or dropped is x or view.out_scale is None:
    return None, base
  changed = product(dropped)
  return base - changed, changed


def _no_bias(view: View):
  if view.bias is not None:
    raise Unsupported("a bias of its own where the weight is used the other way round")


def dot_general(eqn, operands, product, drop, observe) -> jax.Array:
  """The product for a weight on either side, with any batch and free axes."""
  axes = axes_of(eqn, operands)
  side = 0 if is_view(operands[0]) else 1
  view, x = operands[side], operands[1 - side]
  if view.is_frozen:
    return product(x)
  contract, batch = jx.param(eqn, "dimension_numbers")
  names = iter(string.ascii_letters.replace("z", ""))
  w = [next(names) for _ in view.dims]
  pairs = [*zip(contract[side], contract[1 - side], strict=True)]
  pairs += [*zip(batch[side], batch[1 - side], strict=True)]
  shared = {j: w[i] for i, j in pairs}
  xs = [shared.get(j) or next(names) for j in range(x.ndim)]
  x_free = [xs[j] for j in range(x.ndim) if j not in shared]
  w_free = [w[i] for i in axes.kept]
  batched = [w[i] for i in batch[side]]
  names_out = batched + (w_free + x_free if side == 0 else x_free + w_free)

  form, token = None, None
  if view.choice is not None:
    if view.choice.by_token:
      free = {j: n for j, n in enumerate(x.shape) if j not in shared}
      token = xs[view.choice.token_axis(view.path, free)]
      w.append(token)
    # A ragged product has no precision of its own.
    sortable = observe is None and jx.param(eqn, "precision") is None
    form = _form(view, view.choice, axes, x, sortable)
    view = view.chosen() if form == "gathered" else view.scaled_as_chosen()
  contracted, other, turned = _factors(view, axes)
  if turned:
    _no_bias(view)
  scaled = _scales_input(view, axes.contracted)
  if scaled:
    x = x * _placed(view.out_scale, w, xs).astype(x.dtype)
  base = product(x)
  summed = {w[i] for i in axes.contracted}
  full = list(contracted.shape)
  for i in axes.contracted:
    full[i] = view.shape[i]
  contracted = jnp.broadcast_to(contracted, full)
  contracted, contracted_names = _named_keeping(contracted, w, axes.contracted)
  other, other_names = _named(other, w)
  middle = [c for c in xs if c not in summed]
  middle += [c for c in contracted_names if c not in (*summed, *middle, "z")]
  rows = tuple(n for j, n in enumerate(x.shape) if j not in shared)
  dropped = drop(view, x)
  kept, base = (None, base) if scaled else _kept(base, x, dropped, view, product)
  x = dropped
  x, xs, out = _merged(x, xs, names_out, "" if token else "".join(x_free))
  middle = [c for c in middle if c in xs or c not in x_free]
  kwargs = {"precision": jx.param(eqn, "precision")}
  # An axis of size 1 that neither factor names plays no part in the product.
  told = set(middle) | set(other_names)
  out = [c for c in out if c in told]
  if form == "sorted":
    delta = _Named(contracted, contracted_names), _Named(other, other_names)
    found = _sorted(_Named(x, xs), *delta, view.choice, token)
    y = jnp.einsum(f"{''.join(found.names)}->{''.join(out)}", found.array)
  else:
    z = jnp.einsum(
      f"{''.join(xs)},{contracted_names}->{''.join(middle)}z",
      x,
      contracted.astype(x.dtype),
      **kwargs,
    )
    if view.choice is not None and form == "side by side":
      z = view.choice.mask(z, middle.index(token) if token else 0)
    if observe is not None:
      if turned or not set(other_names) <= {*middle, "z"}:
        raise Unsupported("the inputs of joined or tied weights are not told apart")
      z = observe(z, other, "".join([*middle, "z"]), other_names, rows)
    y = jnp.einsum(
      f"{''.join(middle)}z,{other_names}->{''.join(out)}",
      z,
      other.astype(x.dtype),
      preferred_element_type=base.dtype,
      **kwargs,
    )
  told |= set(x_free)
  sizes = zip(names_out, base.shape, strict=True)
  y = _sum(base, y.reshape([n if c in told else 1 for c, n in sizes]))
  y = _finished(y, view, lambda t: _placed(t, w, names_out), scaled)
  return y if kept is None else kept + y


class _Named(NamedTuple):
  """An array, and a letter for each of its axes."""

  array: jax.Array
  names: Sequence[str]


def _sorted(
  x: _Named, contracted: _Named, other: _Named, choice: Choice, token: str | None
) -> _Named:
  """(x contracted) other, with the factors of each place's slot."""
  places = [c for c in x.names if c not in contracted.names]
  inputs = [c for c in x.names if c in contracted.names]
  outputs = [c for c in other.names if c != "z"]

  def of_slots(t: _Named, names: list[str]) -> jax.Array:
    """Slots x rank x the axes of these names as one."""
    array = jnp.einsum(f"{''.join(t.names)}->{''.join(names)}z", t.array)
    array = choice.each(array.astype(x.array.dtype))
    return array.reshape((*array.shape[:2], -1))

  size = dict(zip(x.names, x.array.shape, strict=True))
  size |= zip(other.names, other.array.shape, strict=True)
  rows = jnp.einsum(f"{''.join(x.names)}->{''.join([*places, *inputs])}", x.array)
  sizes, slots = [size[c] for c in places], choice.slot
  if token:
    slots = choice.of_places(sizes, places.index(token))
  y = evaluations.sorted_product(
    rows.reshape((*sizes, -1)),
    slots,
    of_slots(contracted, inputs),
    of_slots(other, outputs),
  )
  return _Named(y.reshape((*sizes, *(size[c] for c in outputs))), places + outputs)


def _form(
  view: View, choice: Choice, axes: Axes, x: jax.Array, sortable: bool
) -> evaluations.Form:
  """The evaluation of a product with a view of several adapters."""
  contracted, other, _ = _factors(view, axes)
  sortable &= not axes.shared
  sortable &= all(contracted.shape[i] == 1 for i in axes.kept)
  sortable &= all(other.shape[i] in (1, view.shape[i]) for i in axes.kept)
  places = x.size // math.prod(view.shape[i] for i in (*axes.contracted, *axes.shared))
  rank = view.a.shape[-1] // choice.slots
  return evaluations.form_of(choice, places, rank, sortable)


def _merged(x, xs, out, free: str) -> tuple[jax.Array, list[str], list[str]]:
  """x with its free axes as one, where they are adjacent; names of x and result.

  The gradients of the factors then contract one axis: of several, XLA first makes the
  last, and so stores a transposed copy of what the large product's gradient is. Rows
  and tokens that are both sharded can't be one axis.
  """
  at = "".join(xs).find(free)
  ways = jax.sharding.get_abstract_mesh().shape.get(devices.TOKENS, 1)
  if len(free) < 2 or at < 0 or ways > 1:
    return x, xs, out
  rest = [c for c in out if c not in free[1:]]
  shape = [*x.shape[:at], -1, *x.shape[at + len(free) :]]
  return x.reshape(shape), [c for c in xs if c not in free[1:]], rest


def _named_keeping(t, letters, always) -> tuple[jax.Array, str]:
  """Same as `_named`, but keeps the contracted axes even where their size is 1."""
  keep = [i for i in range(t.ndim - 1) if t.shape[i] != 1 or i in always]
  shape = [t.shape[i] for i in keep] + [t.shape[-1]]
  return t.reshape(shape), "".join(letters[i] for i in keep) + "z"


def conv(eqn, operands, product, drop, observe) -> jax.Array:
  """base + conv(x, contracted) other, the window on the factor that carries it.

  That is the same window into r channels and then 1 x 1, or, in the gradient by the
  input of such a convolution, 1 x 1 first.
  """
  x, view = operands
  if view.is_frozen:
    return product(x)
  if observe is not None:
    raise Unsupported("the inputs of a convolution are not observed")
  if view.choice is not None and view.choice.by_token:
    raise Unsupported("a convolution, whose places are no tokens with an index each")
  view = view.chosen()
  d, groups = jx.param(eqn, "dimension_numbers"), jx.param(eqn, "feature_group_count")
  out_axis, in_axis, *window = d.rhs_spec
  sides = Axes((in_axis,), (), (out_axis,))
  contracted, other, turned = _factors(view, sides)
  if view.roles_of((out_axis,)) & view.roles_of((in_axis,)):
    raise Unsupported("a convolution over both factors' axes")
  if turned:
    _no_bias(view)
  if _scales_input(view, (in_axis, *window)):
    raise Unsupported("a convolution whose inputs are scaled")
  rank, precision = contracted.shape[-1], jx.param(eqn, "precision")
  place = lambda t: _on_channel(t, d, out_axis)
  base, dropped = product(x), drop(view, x)
  kept, base = _kept(base, x, dropped, view, product)
  x = dropped

  def windowed(x, kernel):
    return jx.bind(eqn, [x, kernel.astype(x.dtype)], preferred_element_type=None)[0]

  def finished(y):
    y = _finished(_sum(base, y), view, place)
    return y if kept is None else kept + y

  if groups * rank > view.shape[out_axis] or contracted.shape[out_axis] != 1:
    # The factor would give more channels than the kernel does: the kernel's change is
    # smaller than these activations, and is formed. Or one factor is that change.
    change = jnp.broadcast_to(dense(contracted, other, jnp.float32), view.shape)
    return finished(windowed(x, change))
  if any(other.shape[i] != 1 for i in window):
    if groups > 1 or any(contracted.shape[i] != 1 for i in window):
      raise Unsupported("a convolution whose window both factors carry, or in groups")
    channel = d.lhs_spec[1]
    narrow = contracted.reshape(contracted.shape[in_axis], rank).astype(x.dtype)
    z = jnp.einsum(
      "...i,iz->...z", jnp.moveaxis(x, channel, -1), narrow, precision=precision
    )
    kernel = jnp.moveaxis(other.squeeze(in_axis), -1, in_axis)
    return finished(windowed(jnp.moveaxis(z, -1, channel), kernel))
  kernel = jnp.moveaxis(contracted.squeeze(out_axis), -1, out_axis)
  # Every group reads its own inputs by the same contracted factor.
  z = windowed(x, jnp.concatenate([kernel] * groups, axis=out_axis))
  channel = d.out_spec[1]
  z = jnp.moveaxis(z, channel, -1)  # (..., groups * r)
  z = z.reshape((*z.shape[:-1], groups, rank))
  other = jnp.moveaxis(other, out_axis, 0).reshape((groups, -1, rank))
  y = jnp.einsum("...gz,goz->...go", z, other.astype(x.dtype), precision=precision)
  y = jnp.moveaxis(y.reshape((*y.shape[:-2], -1)), -1, channel)
  return finished(y)


def _on_channel(t: jax.Array, d: Any, out_axis: int) -> jax.Array:
  shape = [1] * (t.ndim - 1)
  shape[d.out_spec[1]] = t.shape[out_axis]
  return t.reshape(shape)


def ragged_product(eqn, operands, product, drop, observe) -> jax.Array:
  """base + ragged(ragged(x, contracted), other), with the rows of the same groups."""
  x, view, sizes = operands
  if view.is_frozen:
    return product(x)
  if observe is not None:
    raise Unsupported("the inputs of a ragged product are not observed")
  if view.choice is not None and view.choice.by_token:
    raise Unsupported("tokens that choose adapters are sorted for a ragged product")
  view, axes = view.chosen(), axes_of(eqn, operands)
  contracted, other, turned = _factors(view, axes)
  (i,), (o,) = axes.contracted, axes.kept
  own = ragged.groups(sizes, x.shape[0])

  def each(t):
    """A part for each group, though they share it: rows of no group have none."""
    return jnp.broadcast_to(t, (view.shape[0], *t.shape[1:]))

  def place(t):
    """An out_scale or a bias of each row, by its group."""
    t = each(t).reshape(view.shape[0], -1)
    return t.at[own].get(mode="fill", fill_value=0)

  def times(x, t, back=False):
    """Rows times a factor, ExIxr, or back from r outputs by ExOxr."""
    active = jx.param(eqn, "active")
    return ragged.product(x, each(t).astype(x.dtype), sizes, turned=back, active=active)

  if turned:
    _no_bias(view)
  scaled = _scales_input(view, axes.contracted)
  if scaled:
    x = x * place(view.out_scale).astype(x.dtype)
  base, dropped = product(x), drop(view, x)
  kept, base = (None, base) if scaled else _kept(base, x, dropped, view, product)
  if contracted.shape[o] != 1:  # The change is one factor, and dense.
    change = jnp.broadcast_to(dense(contracted, other, jnp.float32), view.shape)
    y = jx.bind(eqn, [dropped, change.astype(x.dtype), sizes])[0]
  else:
    full = list(contracted.shape)
    full[i] = view.shape[i]
    contracted = jnp.broadcast_to(contracted, full).squeeze(o)
    y = times(times(dropped, contracted), other.squeeze(i), back=True)
  y = _finished(_sum(base, y), view, place, scaled)
  return y if kept is None else kept + y


RULES = {
  "conv_general_dilated": conv,
  "dot_general": dot_general,
  "ragged_product": ragged_product,
}
