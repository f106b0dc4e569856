"""Functions with a derivative rule of their own (custom_jvp, custom_vjp).

Where a weight goes into one, the rule is followed and not the derivative of what the
function computes. The call is rebuilt with the rule's programs, rewritten: that of
tangents, or the forward and the backward one. What a backward program gives as the
weight's gradient is never formed: it is followed back to the contraction of two smaller
arrays that makes it, and these are contracted with the factors, by transposing the
equations between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from lorax_flax.adapt.interpret import call_rules
from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.interpret.view import View, is_view
from lorax_flax.errors import LoraxError


def _entered(run: Any, name: str, operands: Sequence[Any]) -> Any:
  """The run inside a function with a rule of its own, of this name."""
  for x in operands:
    if is_view(x) and x.bias is not None:
      raise Unsupported(f"{name} has its own derivative; a bias cannot join it")
    if is_view(x) and x.dropout and run.dropout_key is not None:
      raise Unsupported(f"{name} has its own derivative; dropout cannot join it")
  return replace(run, inside=f" inside {name}")


def _tangents(run: Any, eqn: Any, call: jx.Call, operands: list[Any]) -> list[Any]:
  """A custom_jvp: its rule's program, run on the weights and on their changes.

  The changes stay unevaluated too, in the backward pass as well: JAX transposes the
  program that was rewritten.
  """
  inside = _entered(run, jx.rule_name(eqn), operands)
  # The product of a stored weight has no rule for tangents.
  operands = [x.settled() if is_view(x) else x for x in operands]

  @jax.custom_jvp
  def ruled(*operands):
    return call_rules.programs(inside, eqn, call)[0](*operands)

  def forward(primals, tangents):
    moves = list(map(_moves, tangents))
    program, n = jx.tangent(eqn, moves), len(eqn.outvars)
    pairs = [pair for m, *pair in zip(moves, primals, tangents, strict=True) if m]
    results: list[Any] = []
    changes: list[list[Any]] = []
    for moving in _changes(pairs):
      values = inside.plain(
        eqn.primitive.name, inside.closed(program, [*primals, *moving])
      )
      results, change = values[:n], values[n:]
      changes.append(change)
    sums = iter([sum(xs[1:], xs[0]) for xs in zip(*changes, strict=True)])
    return results, [
      next(sums) if jx.is_float(y) else np.zeros(y.shape, jax.dtypes.float0)
      for y in results
    ]

  ruled.defjvp(forward, symbolic_zeros=True)
  return list(ruled(*operands))


def _is_zero_tangent(x: Any) -> bool:
  return isinstance(x, SymbolicZero)


def _moves(tangent: Any) -> bool:
  leaves = jax.tree.leaves(tangent, is_leaf=_is_zero_tangent)
  return not all(map(_is_zero_tangent, leaves))


def _changes(pairs: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
  """Tangents of some operands, in parts, each linear in what moves; they add up.

  Those of out_scale * (W + a b) are out_scale * (dW + da b), out_scale * a db, and the
  change of out_scale.
  """
  yield [
    _change(x, value=t.value, a=t.a) if is_view(x) else _made(t, x) for x, t in pairs
  ]
  for i, (x, t) in enumerate(pairs):
    parts = []
    if is_view(x) and _moves(t.b):
      parts.append(_change(x, b=t.b))
    if is_view(x) and _moves(t.out_scale):
      parts.append(replace(x, out_scale=t.out_scale))
    for part in parts:
      still = [_change(y) if is_view(y) else jnp.zeros_like(y) for y, _ in pairs]
      yield [*still[:i], part, *still[i + 1 :]]


def _made(tangent: Any, x: Any) -> Any:
  return tangent if _moves(tangent) else jnp.zeros_like(x)


def _change(x: View, value: Any = None, a: Any = None, b: Any = None) -> View:
  """The change of a weight where its value and one of its factors move."""
  if value is None or not _moves(value):
    value = jax.ShapeDtypeStruct(x.shape, x.dtype)
  if a is not None and _moves(a):
    return replace(x, value=value, a=a)
  return replace(x, value=value, b=jnp.zeros_like(x.b) if b is None else b)


def _ruled(run: Any, eqn: Any, described: jx.Call, operands: list[Any]) -> list[Any]:
  """A custom_vjp: its forward and backward programs, rewritten."""
  name = jx.rule_name(eqn)
  inside = _entered(run, name, operands)

  def plain(values):
    return inside.plain(eqn.primitive.name, values)

  @jax.custom_vjp
  def call(*operands):
    return call_rules.programs(inside, eqn, described)[0](*operands)

  def forward(*marked):
    moved = [_moved(x) for x in marked]
    given = [jax.tree.map(lambda p: p.value, x, is_leaf=_is_marked) for x in marked]
    rule = jx.rule(eqn, moved)
    results = inside.closed(rule.fwd, given)
    n = len(eqn.outvars)
    # A weight that the rule keeps stays a base and its delta.
    weights = [
      x if is_view(x) and m else None for x, m in zip(given, moved, strict=True)
    ]
    with_base = [x is not None and _moved(m.value) for x, m in _pairs(weights, marked)]
    return plain(results[:n]), (
      results[n:],
      weights,
      _Static(rule.bwd, moved, with_base),
    )

  def backward(kept, cotangents):
    values, weights, static = kept
    cotangents = [
      jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c
      for c, v in zip(cotangents, eqn.outvars, strict=True)
      if jx.is_float(v.aval)
    ]
    program = _Program(inside, static.bwd, [*values, *cotangents])
    outs = iter(program.outs)
    found: list[Any] = []
    for weight, moved, with_base in zip(
      weights, static.moved, static.with_base, strict=True
    ):
      if not moved:
        found.append(None)
      elif weight is None:
        found += plain([program.read(next(outs))])
      else:
        found.append(_gradient(program, next(outs), weight, name, with_base))
    return tuple(found)

  call.defvjp(forward, backward, symbolic_zeros=True)
  return list(call(*operands))


def _pairs(weights, marked):
  return zip(weights, marked, strict=True)


def _is_marked(x: Any) -> bool:
  return isinstance(x, CustomVJPPrimal)


def _moved(x: Any) -> bool:
  """True where a derivative with respect to any part of an operand is requested."""
  return any(p.perturbed for p in jax.tree.leaves(x, is_leaf=_is_marked))


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Static:
  """Static input of the backward half: which operands have a gradient."""

  bwd: Any
  moved: list[bool]
  with_base: list[bool]


@dataclass
class _Program:
  """A program whose values are computed when they are read, so that none is in vain."""

  run: Any
  program: Any
  operands: Sequence[Any]
  env: dict[Any, Any] = field(default_factory=dict)
  source: dict[Any, Any] = field(default_factory=dict)

  def __post_init__(self):
    jaxpr, consts = jx.open_jaxpr(self.program)
    self.env.update(zip(jaxpr.constvars, consts, strict=True))
    self.env.update(zip(jaxpr.invars, self.operands, strict=True))
    self.source.update((var, eqn) for eqn in jaxpr.eqns for var in eqn.outvars)
    self.equations, self.outs = jaxpr.eqns, jaxpr.outvars

  def read(self, atom: Any) -> Any:
    if isinstance(atom, jx.Literal):
      return atom.val
    if atom not in self.env:
      needed, todo = {atom}, []
      for eqn in reversed(self.equations):
        if not needed.isdisjoint(eqn.outvars):
          todo.append(eqn)
          known = (a for a in eqn.invars if not isinstance(a, jx.Literal))
          needed |= {a for a in known if a not in self.env}
      for eqn in reversed(todo):
        if eqn.outvars[0] not in self.env:
          results = self.run.equation(eqn, [self.read(a) for a in eqn.invars])
          self.env.update(zip(eqn.outvars, results, strict=True))
    return self.env[atom]


def _gradient(program: _Program, atom: Any, weight: View, name, with_base) -> View:
  """The factors' gradient where the rule gives `atom` as the weight's.

  Args:
    with_base: whether the gradient of the base itself was asked for as well.
  """
  run = program.run
  strict = replace(program, run=replace(run, strict=True))
  # The out_scale's gradient needs the product with the weight itself.
  value = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
  value = value if weight.out_scale is None else weight.value

  def products(parts):
    a, b, out_scale = parts
    moving = replace(weight, value=value, a=a, b=b, out_scale=out_scale)
    pairs = _paired(strict, atom, moving)
    return [y for y, _ in pairs], [c for _, c in pairs]

  factors = weight.a, weight.b, weight.out_scale
  try:
    _, pull, cotangents = jax.vjp(products, factors, has_aux=True)
  except Unsupported as e:
    if not run.may_materialize:
      raise LoraxError(
        f"{weight.path!r} goes into {name}, whose rule gives it a gradient that does"
        f" not follow from a contraction: {e}. Exclude it, or pass"
        " on_unsupported='materialize' to form the dense gradient there"
      ) from e
    run.warn_dense(weight.path, name, str(e))

    def formed(parts):
      a, b, out_scale = parts
      return replace(weight, a=a, b=b, out_scale=out_scale).dense()

    _, pull = jax.vjp(formed, factors)
    cotangents = program.read(atom)
  ((a, b, out_scale),) = pull(cotangents)
  base = None
  if with_base:
    base = program.read(atom)
    base = (
      base
      if weight.out_scale is None
      else base * weight.out_scale[..., 0].astype(base.dtype)
    )
  return replace(weight, value=base, a=a, b=b, out_scale=out_scale, index=None)


# Operands in which a primitive is linear together, the others being held.
TOGETHER = {
  "add": (0, 1),
  "add_any": (0, 1),
  "dynamic_update_slice": (0, 1),
  "scatter-add": (0, 2),
  "sub": (0, 1),
}
ALONE = {
  "broadcast_in_dim",
  "convert_element_type",
  "copy",
  "dynamic_slice",
  "name",
  "neg",
  "reduce_sum",
  "reshape",
  "rev",
  "sharding_constraint",
  "slice",
  "squeeze",
  "transpose",
}
EITHER = {"conv_general_dilated", "dot_general"}


def _linear_in(eqn: Any) -> list[tuple[int, ...]]:
  """The ways to take an equation as linear: numbers of the operands that move."""
  name, atoms = eqn.primitive.name, eqn.invars
  if name == "concatenate":
    return [tuple(range(len(atoms)))]
  if name in TOGETHER:
    return [TOGETHER[name]]
  if name in ALONE or (name == "div" and not atoms[1].aval.shape):
    return [(0,)]
  if name in EITHER:
    return [(0,), (1,)]
  if name == "mul":
    return [(i,) for i in (0, 1) if not atoms[1 - i].aval.shape]
  return []


def _paired(program: _Program, atom: Any, weight: View) -> list[tuple[Any, Any]]:
  """<atom, weight> as a sum of <y, c>, where y has come through a contraction.

  Returns:
    pairs (y, c): y depends on the weight's factors, c is a value of the program.
  """
  if isinstance(atom, jx.Literal) or atom not in program.source:
    raise Unsupported("it hands on a value of the weight's shape")
  eqn = program.source[atom]
  if _is_zero(eqn):
    return []
  ways, why = _linear_in(eqn), f"{eqn.primitive.name!r} is no linear step"
  for numbers in ways:
    try:
      others = [x for i, x in enumerate(eqn.invars) if i not in numbers]
      given = [weight, *map(program.read, others)]
      results = program.run.closed(jx.transposed(eqn, numbers), given)
      pairs: list[tuple[Any, Any]] = []
      for i, y in zip(numbers, results, strict=True):
        source = eqn.invars[i]
        if is_view(y):
          pairs += _paired(program, source, y)
        else:
          pairs.append((y, program.read(source)))
      return pairs
    except Unsupported as e:
      why = str(e)
  raise Unsupported(why)


def _is_zero(eqn: Any) -> bool:
  (first, *_) = eqn.invars or [None]
  return (
    eqn.primitive.name == "broadcast_in_dim"
    and isinstance(first, jx.Literal)
    and not first.val
  )


RULES = {"custom_jvp_call": _tangents, "custom_vjp_call": _ruled}
