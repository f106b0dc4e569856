"""Finds by tracing what a program does with its weights. Shapes only, no FLOPs.

An abstract run of the jaxpr: a weight is a `View` without factors, anything else the
set of contractions that it last came through. Contractions tell the roles of a weight's
axes; what reaches an output through one contraction alone tells the output head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret import layout_rules, look_ups, product_rules
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.interpret.view import Dim, View, is_view

INPUT = "<input>"
Through = frozenset[str]  # the contractions that a value last came through


@dataclass
class Usage:
  """Record of what a program does with one weight.

  Attributes:
    sites: for each contraction, (primitive, role of each kernel axis that it met).
    problems: primitive to why it has no rule.
  """

  sites: list[tuple[str, dict[int, str]]] = field(default_factory=list)
  problems: dict[str, str] = field(default_factory=dict)

  @property
  def primitives(self) -> set[str]:
    return {name for name, _ in self.sites}


@dataclass
class Discovery:
  usage: dict[str, Usage]
  stack: dict[tuple[str, int], str] = field(default_factory=dict)
  heads: frozenset[str] = frozenset()

  def problem(self, views: Sequence[View], primitive: str, why: str):
    for view in views:
      for path in view.paths():
        self.usage[path].problems[primitive] = why


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
      operands.append(frozenset({INPUT}) if i in set(inputs) else frozenset())
  results = _settled(found, _run(found, open_, operands))
  heads = set()
  for result in results:
    if is_view(result):
      found.problem([result], "output", "the function returns the weight")
    elif len(result) == 1 and INPUT not in result:
      heads |= result
  found.heads = frozenset(heads)
  return found


def _abstract(var: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _through(values: Sequence[Any]) -> Through:
  return frozenset().union(*(v for v in values if not is_view(v)))


def _run(found: Discovery, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
  env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, frozenset())
  env.update(zip(jaxpr.invars, operands, strict=True))

  def read(atom):
    return frozenset() if isinstance(atom, jx.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    results = _equation(found, eqn, [read(a) for a in eqn.invars])
    env.update(zip(eqn.outvars, results, strict=True))
  return [read(a) for a in jaxpr.outvars]


def _equation(found: Discovery, eqn: Any, operands: list[Any]) -> list[Any]:
  name = eqn.primitive.name
  moves = any(not is_view(v) and v for v in operands)
  try:
    data = look_ups.data(eqn, operands, moves)
  except Unsupported:
    data = {i for i, v in enumerate(operands) if is_view(v) and look_ups.is_table(v)}
  operands = [_rows(found, v) if i in data else v for i, v in enumerate(operands)]
  views = [v for v in operands if is_view(v)]
  moves = any(not is_view(v) and v for v in operands)
  call = jx.call(eqn)
  if isinstance(call, jx.Call) and (views or call.is_inline or call.has_rule):
    return _call(found, name, call, operands)
  if not views:
    return [_through(operands)] * len(eqn.outvars)
  if isinstance(call, jx.Loop):
    return _loop(found, name, call, operands)
  through = _through(operands)
  # Rules look at the shapes of the operands that are not views.
  shown = [
    v if is_view(v) else _abstract(a) if hasattr(a, "aval") else a
    for v, a in zip(operands, eqn.invars, strict=True)
  ]
  try:
    if name in look_ups.RULES:
      if moves and name in layout_rules.WITH_CONSTANTS:
        raise Unsupported("a sum with what depends on the inputs")
      outs = look_ups.RULES[name](eqn, shown, [_abstract(v) for v in eqn.outvars])
      if name == "dynamic_slice" and INPUT not in through:
        # A place in the program (a layer's number) does not look anything up.
        return [replace(v, looked_up=operands[0].looked_up) for v in outs]
      return [v if is_view(v) else through for v in outs]
    if name in product_rules.RULES:
      axes = product_rules.axes_of(eqn, shown)
      _record(found, views[0], product_rules.site(eqn), axes)
      return [views[0].paths() | frozenset()] * len(eqn.outvars)
    why = "has no rule"
  except Unsupported as e:
    why = str(e)
  tables = [v for v in views if look_ups.is_table(v)]
  found.problem([v for v in views if v not in tables], name, why)
  through = through.union(*(_rows(found, v) for v in tables))
  return [through] * len(eqn.outvars)


def _record(found: Discovery, view: View, primitive: str, axes: product_rules.Axes):
  sites: dict[str, dict[int, str]] = {path: {} for path in view.paths()}
  chosen = look_ups.chosen(view, axes)
  for role, numbers in zip(("in", "stack", "out"), axes, strict=True):
    for i in numbers:
      if view.dims[i].role == "stack" or i in chosen:
        continue
      for path, axis in view.dims[i].labels:
        if sites[path].setdefault(axis, role) != role:
          found.problem([view], primitive, f"axis {axis} is split between two roles")
  for path, roles in sites.items():
    found.usage[path].sites.append((primitive, roles))


def _rows(found: Discovery, view: View) -> Through:
  """Rows of a table as data: what was looked up is "in", an axis of the rows "out"."""
  looked = view.looked_up.labels if view.looked_up else frozenset()
  labels = {x for d in view.dims if d.role != "stack" for x in d.labels}
  for path in view.paths() | {path for path, _ in looked}:
    site = {axis: "out" for p, axis in labels - looked if p == path}
    site |= {axis: "in" for p, axis in looked if p == path}
    found.usage[path].sites.append(("gather", site))
  return frozenset(view.paths())


def _settled(found: Discovery, values: Sequence[Any]) -> list[Any]:
  """Results of a program of its own: rows looked up in it are data."""
  return [_rows(found, v) if is_view(v) and look_ups.is_table(v) else v for v in values]


def _plain(found: Discovery, values: Sequence[Any], primitive: str) -> list[Through]:
  """Values that must not be weights here; a weight among them is a problem."""
  for v in values:
    if is_view(v):
      found.problem([v], primitive, "hands the weight on as a result")
  return [frozenset() if is_view(v) else v for v in values]


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
      joined.append(_through([old, new]))
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
    x.union(*rest) if rest else x for x, *rest in zip(first, *others, strict=True)
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
  found.stack.update(dict.fromkeys(x.dims[0].labels, "stack"))
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
  swap = {"in": "out", "out": "in", "stack": "stack"}
  agreed = dict(sites[0][1])
  for primitive, site in sites[1:]:
    common = agreed.keys() & site.keys()
    straight = all(agreed[i] == site[i] for i in common)
    if not straight and not all(agreed[i] == swap[site[i]] for i in common):
      raise Unsupported(
        f"{primitive} splits its axes into {site}, {sites[0][0]} into {agreed}"
      )
    for i, role in site.items():
      agreed.setdefault(i, role if straight else swap[role])
  # An axis that was indexed away before every product holds separate weights.
  found_roles = tuple(
    "stack" if i in stacked else agreed.get(i, "stack") for i in range(ndim)
  )
  if not {"in", "out"} <= set(found_roles):
    raise Unsupported(f"its axes have the roles {found_roles}: no low-rank delta fits")
  return found_roles
