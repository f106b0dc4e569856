"""Finds by tracing what a program does with its weights. Shapes only, no FLOPs.

An abstract run of the jaxpr: a weight is a `View` without factors, anything else a
`Flow`. Contractions tell the roles of a weight's axes; what a weight's product feeds,
and the outputs that it reaches, tell the output heads; what is added to its result, the
biases.
"""

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret import flow, layout_rules, look_ups, product_rules
from lorax_flax.adapt.interpret.flow import Flow
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.interpret.view import Dim, View, is_view

# What a delta of any method follows, where the weight's products agree on its axes.
PLAIN = {
  "checkpoint",
  "closed_call",
  "conv_general_dilated",
  "convert_element_type",
  "copy",
  "copy_p",
  "core_call",
  "dot_general",
  "gather",
  "jit",
  "name",
  "pjit",
  "ragged_product",
  "remat2",
  "scan",
  "sharding_constraint",
  "squeeze",
  "transpose",
}

_TURNED = {"in": "out", "out": "in"}


@dataclass
class Usage:
  """Record of what a program does with one weight.

  Attributes:
    sites: for each contraction, (primitive, role of each kernel axis that it met).
    refused: primitive to why it has no rule.
    rivals: primitive to the weights that this one meets in its products.
    num_axes: the most axes of the weight at a refusal, less stack axes and those of
      size 1: of a scale or a bias 1, whatever it is stacked to.
    added_to: the kernels to whose products' results it is added.
    met: the primitives that it meets, calls that it goes into among them.
  """

  sites: list[tuple[str, dict[int, str]]] = field(default_factory=list)
  refused: dict[str, str] = field(default_factory=dict)
  rivals: dict[str, set[str]] = field(default_factory=dict)
  num_axes: int = 0
  added_to: frozenset[str] = frozenset()
  met: set[str] = field(default_factory=set)

  @property
  def problems(self) -> dict[str, str]:
    """Primitive to why a delta cannot follow there."""
    met = dict.fromkeys(self.rivals, "a product of two adapted weights")
    return self.refused | met

  @property
  def primitives(self) -> set[str]:
    return {name for name, _ in self.sites}

  @property
  def is_plain(self) -> bool:
    """True where every rule follows, and finds a gradient, whatever the factors are."""
    splits = {tuple(sorted(roles.items())) for _, roles in self.sites}
    return self.met <= PLAIN and len(splits) == 1


@dataclass
class Discovery:
  """Record of what a program does with its weights.

  Attributes:
    usage: by path.
    stack: the (path, axis) that a loop runs over.
    fed: the weights whose products' results feed a weight's product.
    heads: the weights whose product's result is an output: it reaches outputs through
      no other product, and feeds none.
    spread: of the variables met, those that were broadcast: `encoding.spread`.
  """

  usage: dict[str, Usage]
  stack: set[tuple[str, int]] = field(default_factory=set)
  fed: set[str] = field(default_factory=set)
  heads: frozenset[str] = frozenset()
  spread: dict[Any, tuple[int, ...]] = field(default_factory=dict)

  def problem(self, views: Sequence[View], primitive: str, why: str):
    for view in views:
      for path in view.paths():
        usage = self.usage[path]
        usage.refused[primitive] = why
        usage.num_axes = max(usage.num_axes, len(_own_axes(view, path)))

  def met(self, views: Sequence[View], primitive: str):
    """Records a product of weights with one another."""
    for view in views:
      others = set().union(*(v.paths() for v in views if v is not view))
      for path in view.paths():
        self.usage[path].rivals.setdefault(primitive, set()).update(others)


def _own_axes(view: View, path: str) -> list[int]:
  """The axes of a view, longer than 1, that hold axes of a weight, less stack axes."""
  return [
    i
    for i, dim in enumerate(view.dims)
    if dim.role != "stack"
    and view.shape[i] != 1
    and any(label[0] == path for label in dim.labels)
  ]


def discover(
  jaxpr: Any, weights: dict[int, tuple[str, tuple[int, ...]]], inputs: Sequence[int]
) -> Discovery:
  """Runs the jaxpr abstractly.

  Args:
    jaxpr: of the full function.
    weights: operand number to (path, axes that are known to be stack axes).
    inputs: operand numbers that are data, not parameters.
  """
  found = Discovery({path: Usage() for path, _ in weights.values()})
  open_, _ = jx.open_jaxpr(jaxpr)
  operands: list[Any] = []
  for i, var in enumerate(open_.invars):
    if i in weights:
      path, stack = weights[i]
      dims = tuple(
        Dim(frozenset({(path, axis)}), "stack" if axis in stack else "?")
        for axis in range(len(var.aval.shape))
      )
      operands.append(View.shown(var.aval.shape, var.aval.dtype, path, dims))
    else:
      operands.append(flow.DATA if i in set(inputs) else flow.NOTHING)
  outputs = []
  results = _settled(found, _run(found, open_, operands))
  for var, result in zip(open_.outvars, results, strict=True):
    if is_view(result):
      found.problem([result], "output", "the function returns the weight")
    else:
      outputs.append((var.aval.shape, result.through))
  found.heads = _heads(outputs) - found.fed
  return found


def _heads(outputs: Sequence[tuple[tuple[int, ...], frozenset[str]]]) -> frozenset[str]:
  """The weights whose product alone stands before outputs: (shape, through) of each.

  What a program returns beside its outputs (a cache, a state, statistics, what was
  sown) comes from products that feed others, or that reach other outputs among others.
  """
  # A scalar, the sum of a loss say, tells nothing where arrays are returned.
  # Nor does what masks and labels have to do with a loss.
  through = [t for shape, t in outputs if shape] or [t for _, t in outputs]
  through = [t - {flow.INTEGERS} for t in through]
  alone = frozenset().union(*(t for t in through if len(t) == 1))
  beside = frozenset().union(*(t for t in through if len(t) > 1))
  return alone - beside - flow.ASIDE


def _abstract(var: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _flows(values: Sequence[Any]) -> list[Flow]:
  return [v for v in values if not is_view(v)]


def _run(found: Discovery, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
  env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, flow.NOTHING)
  env.update(zip(jaxpr.invars, operands, strict=True))
  found.spread.update(jx.spread(jaxpr))

  def read(atom):
    return flow.NOTHING if isinstance(atom, jx.Literal) else env[atom]

  for eqn in jx.equations(jaxpr):
    results = _equation(found, eqn, [read(a) for a in eqn.invars])
    env.update(zip(eqn.outvars, results, strict=True))
  return [read(a) for a in jaxpr.outvars]


def _equation(found: Discovery, eqn: Any, operands: list[Any]) -> list[Any]:
  name = eqn.primitive.name
  moves = _moves(operands)
  try:
    data = look_ups.data(eqn, operands, moves)
  except Unsupported:
    data = {i for i, v in enumerate(operands) if is_view(v) and look_ups.is_table(v)}
  operands = [_rows(found, v) if i in data else v for i, v in enumerate(operands)]
  views = [v for v in operands if is_view(v)]
  for view in views:
    for path in view.paths():
      found.usage[path].met.add(name)
  seen = [_seen(x) for x in operands]
  moves = _moves(operands)
  call = jx.call(eqn)
  has_weights = any(x.made_of for x in seen)
  if isinstance(call, jx.Call) and (has_weights or call.is_inline or call.has_rule):
    return _call(found, name, call, operands)
  if isinstance(call, jx.Loop) and has_weights:
    return _loop(found, name, call, operands)
  result, fed = flow.of_equation(eqn, seen)
  if not views:
    found.fed |= fed
    return [result] * len(eqn.outvars)
  # Rules look at the shapes of the operands that are not views.
  shown = [
    v if is_view(v) else _abstract(a) if hasattr(a, "aval") else a
    for v, a in zip(operands, eqn.invars, strict=True)
  ]
  try:
    if name in look_ups.RULES:
      is_array = any(x.shape for x in shown if not is_view(x) and hasattr(x, "shape"))
      if moves and name in layout_rules.WITH_CONSTANTS and is_array:
        raise Unsupported("elementwise with what depends on the inputs")
      if name in layout_rules.ELEMENTWISE:
        shown = [_narrow(found, x, a) for x, a in zip(shown, eqn.invars, strict=True)]
      outs = look_ups.RULES[name](eqn, shown, [_abstract(v) for v in eqn.outvars])
      if name == "dynamic_slice" and not any(
        flow.ASIDE & x.through for x in _flows(operands)
      ):
        # A place in the program (a layer's number) does not look anything up.
        return [replace(v, looked_up=operands[0].looked_up) for v in outs]
      return [v if is_view(v) else result for v in outs]
    if name in product_rules.RULES and len(views) > 1:
      found.met(views, name)
      found.fed |= fed
      return [Flow(frozenset().union(*(v.paths() for v in views)))] * len(eqn.outvars)
    if name in product_rules.RULES:
      return [_product(found, eqn, operands, shown)] * len(eqn.outvars)
    why = "has no rule"
  except Unsupported as e:
    why = str(e)
  found.fed |= fed
  tables = [v for v in views if look_ups.is_table(v)]
  found.problem([v for v in views if v not in tables], name, why)
  if name == "add" and len(views) == 1 and not tables:
    (other,) = _flows(operands)
    result = _added(found, views[0], other, result)
  for table in tables:
    result = result | _rows(found, table)
  return [result] * len(eqn.outvars)


def _narrow(found: Discovery, x: Any, atom: Any) -> Any:
  """The shape of a value without the axes along which it was broadcast."""
  if is_view(x) or isinstance(atom, jx.Literal) or atom not in found.spread:
    return x
  return jax.ShapeDtypeStruct(found.spread[atom], x.dtype)


def _moves(operands: Sequence[Any]) -> bool:
  """True where an operand that is no weight depends on the inputs."""
  return any(x.through for x in _flows(operands))


def _seen(x: Any) -> Flow:
  """An operand as a value, where no rule follows a weight."""
  return Flow(made_of=frozenset(x.paths())) if is_view(x) else x


def _product(found: Discovery, eqn: Any, operands: list, shown: list) -> Flow:
  """Records a product, and what feeds it; a number of a row to look up feeds none."""
  axes = product_rules.axes_of(eqn, shown)
  (view,) = (x for x in operands if is_view(x))
  _record(found, view, product_rules.site(eqn), axes)
  paths = frozenset(view.paths())
  # A loss that takes its own gradient by a head's inputs multiplies so: a weight that
  # feeds itself there may be a head, unless that product's result is an output.
  own = {path for path in paths if _is_turned(found.usage[path].sites)}
  for x, atom in zip(operands, eqn.invars, strict=True):
    if not is_view(x) and jx.is_float(atom.aval):
      found.fed |= x.through - flow.ASIDE - own
  sizes = flow.product_sizes(view.shape, axes.kept, axes.shared)
  through = paths | {flow.TURNED} if own else paths
  return Flow(through, flow.Product(paths, sizes))


def _is_turned(sites: Sequence[tuple[str, dict[int, str]]]) -> bool:
  """True where the last product is the transpose of the first; a loop's come again."""
  first, last = sites[0][1], sites[-1][1]
  turned = {axis: _TURNED.get(role, role) for axis, role in last.items()}
  return first == turned != last


def _added(found: Discovery, bias: View, to: Flow, result: Flow) -> Flow:
  """Records a bias: a weight that has a place for each of a product's outputs."""
  sizes = [n for n, dim in zip(bias.shape, bias.dims, strict=True) if dim.labels]
  if to.product is None or math.prod(sizes) not in to.product.sizes:
    return result
  for path in bias.paths():
    found.usage[path].added_to |= to.product.paths
  return replace(result, product=to.product)


def _record(found: Discovery, view: View, primitive: str, axes: product_rules.Axes):
  sites: dict[str, dict[int, str]] = {path: {} for path in view.paths()}
  chosen = look_ups.chosen(view, axes)
  for role, numbers in zip(("in", "stack", "out", "window"), axes, strict=True):
    for i in numbers:
      if view.dims[i].role == "stack" or i in chosen:
        continue
      for path, axis in view.dims[i].labels:
        if sites[path].setdefault(axis, role) != role:
          found.problem([view], primitive, f"axis {axis} is split between two roles")
  for path, roles in sites.items():
    found.usage[path].sites.append((primitive, roles))


def _rows(found: Discovery, view: View) -> Flow:
  """Rows of a table as data: what was looked up is "in", an axis of the rows "out"."""
  looked = view.looked_up.labels if view.looked_up else frozenset()
  labels = {x for d in view.dims if d.role != "stack" for x in d.labels}
  for path in view.paths() | {path for path, _ in looked}:
    site = {axis: "out" for p, axis in labels - looked if p == path}
    site |= {axis: "in" for p, axis in looked if p == path}
    found.usage[path].sites.append(("gather", site))
  paths = frozenset(view.paths())
  size = math.prod(view.shape[i] for i in look_ups.row_axes(view))
  return Flow(paths, flow.Product(paths, frozenset({size})))


def _settled(found: Discovery, values: Sequence[Any]) -> list[Any]:
  """Results of a program of its own: rows looked up in it are data."""
  return [_rows(found, v) if is_view(v) and look_ups.is_table(v) else v for v in values]


def _plain(found: Discovery, values: Sequence[Any], primitive: str) -> list[Flow]:
  """Values that must not be weights here; a weight among them is a problem."""
  for v in values:
    if is_view(v):
      found.problem([v], primitive, "hands the weight on as a result")
  return [_seen(v) for v in values]


def _stable(found: Discovery, primitive, before: list, after: list) -> list[Any]:
  """Carried values joined over iterations: a weight must be carried as it is."""
  joined = []
  for old, new in zip(before, after, strict=True):
    if is_view(old) and is_view(new) and old.dims == new.dims:
      joined.append(old)
    elif is_view(old) or is_view(new):
      views = [v for v in (old, new) if is_view(v)]
      found.problem(
        views, primitive, "changes the weight from one iteration to the next"
      )
      joined.append(_seen(old) | _seen(new))
    else:
      joined.append(old | new)
  return joined


def _call(found: Discovery, name: str, call: jx.Call, operands: list) -> list[Any]:
  own = operands[call.num_selectors :]
  columns = [_run(found, jx.open_jaxpr(body)[0], own) for body in call.bodies]
  if not call.is_inline:
    columns = [_settled(found, results) for results in columns]
  if not call.returns_weights:
    columns = [_plain(found, results, name) for results in columns]
  first, *others = columns
  return [
    functools.reduce(operator.or_, rest, x)
    for x, *rest in zip(first, *others, strict=True)
  ]


def _loop(found: Discovery, name: str, loop: jx.Loop, operands: list) -> list[Any]:
  body = jx.open_jaxpr(loop.body)[0]
  cond_consts, consts, carry, scanned = loop.split(operands)
  slices = [_slice(found, x) for x in scanned]
  while True:
    if loop.cond is not None:
      results = _run(found, jx.open_jaxpr(loop.cond)[0], [*cond_consts, *carry])
      _plain(found, results, name)
    results = _settled(found, _run(found, body, [*consts, *carry, *slices]))
    joined = _stable(found, name, carry, results[: len(carry)])
    if joined == carry:
      return [*carry, *(_stack(y, loop.length) for y in results[len(carry) :])]
    carry = joined


def _slice(found: Discovery, x: Any) -> Any:
  """One iteration's slice of a scanned operand, whose first axis is a stack's."""
  if not is_view(x):
    return x
  found.stack |= x.dims[0].labels
  return View.shown(x.shape[1:], x.dtype, x.path, x.dims[1:])


def _stack(x: Any, length: int) -> Any:
  """A weight that each iteration hands out (NNX hands out its state), stacked."""
  if not is_view(x):
    return x
  dims = (Dim(frozenset(), "stack"), *x.dims)
  return View.shown((length, *x.shape), x.dtype, x.path, dims)


def roles(found: Discovery, path: str, ndim: int) -> tuple[str, ...]:
  """The role of each axis of a weight; a look-up, if there is one, decides which is in.

  Raises:
    Unsupported: two products disagree on which axes belong together.
  """
  stacked = {axis for (p, axis) in found.stack if p == path}
  sites = sorted(found.usage[path].sites, key=lambda site: site[0] != "gather")
  # Two uses may be each other's transpose, as with an embedding tied to the logits.
  swap = {"in": "out", "out": "in", "stack": "stack", "window": "window"}
  agree = lambda x, y: x == y or "window" in (x, y)
  agreed = dict(sites[0][1])
  for primitive, site in sites[1:]:
    common = agreed.keys() & site.keys()
    straight = all(agree(agreed[i], site[i]) for i in common)
    if not straight and not all(agree(agreed[i], swap[site[i]]) for i in common):
      raise Unsupported(
        f"{primitive} splits its axes into {site}, {sites[0][0]} into {agreed}"
      )
    for i, role in site.items():
      if agreed.get(i, "window") == "window":
        agreed[i] = role if straight else swap[role]
  # A convolution's window is on its inputs' side, unless other products say otherwise.
  agreed = {i: "in" if role == "window" else role for i, role in agreed.items()}
  # An axis that was indexed away before every product holds separate weights.
  found_roles = tuple(
    "stack" if i in stacked else agreed.get(i, "stack") for i in range(ndim)
  )
  if not {"in", "out"} <= set(found_roles):
    raise Unsupported(f"its axes have the roles {found_roles}: no low-rank delta fits")
  return found_roles
