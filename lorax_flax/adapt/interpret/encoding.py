"""All knowledge of how JAX encodes a program.

The encoding changes between releases: from 0.10 to 0.12 ClosedJaxpr merged into Jaxpr,
and scan's `num_consts` and `num_carry` became `ft_in`. Nothing outside this file reads
an equation's parameters, so a new release is met here.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy
from jax.extend import core as jex

Literal = jex.Literal


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
  """The open jaxpr and the values of its constants, of either kind of jaxpr."""
  return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def equations(jaxpr: Any) -> list[Any]:
  """The equations of an open jaxpr that its results need, or that have an effect."""
  needed = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
  found = []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or not needed.isdisjoint(eqn.outvars):
      found.append(eqn)
      needed.update(x for x in eqn.invars if not isinstance(x, Literal))
  return found[::-1]


def bind(eqn: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
  """Results of an equation on `values`, with some of its parameters changed."""
  prepared = eqn.primitive.get_bind_params(eqn.params | changed)
  subfuns, params = prepared if isinstance(prepared, tuple) else ((), prepared)
  with eqn.ctx.manager, scope(eqn):
    out = eqn.primitive.bind(*subfuns, *values, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def scope(eqn: Any) -> Any:
  """Context of the equation's name stack, under which profiles show it."""
  name = str(eqn.source_info.name_stack)
  return jax.named_scope(name) if name else contextlib.nullcontext()


def param(eqn: Any, name: str) -> Any:
  """A parameter of a primitive that is no call, under jax.lax's name of it."""
  return eqn.params[name]


def is_rows_by_matrix(eqn: Any) -> bool:
  """True for a product (…, K) by (K, J), in that order."""
  if eqn.primitive.name != "dot_general":
    return False
  x, w = (operand.aval.ndim for operand in eqn.invars)
  return w == 2 and param(eqn, "dimension_numbers") == (((x - 1,), (0,)), ((), ()))


class Call(NamedTuple):
  """A call of one of its bodies, whose results are the call's.

  Attributes:
    bodies: jaxprs of the same operands; all but a cond's have one.
    num_selectors: number of operands, before the bodies' own, that choose the body.
    is_inline: whether it means the same when its body runs in its place.
    has_rule: whether it has a derivative rule of its own.
    returns_weights: whether a weight may leave as it came (NNX hands a layer's state
      out again).
    options: what else the function of JAX takes that makes such a call.
  """

  bodies: tuple[Any, ...]
  num_selectors: int = 0
  is_inline: bool = False
  has_rule: bool = False
  returns_weights: bool = False
  options: Mapping[str, Any] = MappingProxyType({})


class Loop(NamedTuple):
  """A scan or a while.

  Operands are the condition's consts, the body's consts, the carry, then the scanned
  inputs; results are the carry, then what the iterations' other results are stacked to.

  Attributes:
    cond: jaxpr of (its consts, the carry) to a boolean; None for a scan.
    body: jaxpr of (its consts, the carry, a slice of each scanned input).
    counts: number of operands of the first three groups.
    length: number of iterations; of a while it is not known, and 1.
    options: what else `lax.scan` takes.
  """

  cond: Any | None
  body: Any
  counts: tuple[int, int, int]
  length: int = 1
  options: Mapping[str, Any] = MappingProxyType({})

  def split(self, operands: Sequence[Any]) -> Iterator[list[Any]]:
    """The four groups of the operands, in order."""
    given = iter(operands)
    for n in self.counts:
      yield list(itertools.islice(given, n))
    yield list(given)


def _jit(p: Any) -> Call:
  shardings = {name: p[name] for name in ("in_shardings", "out_shardings")}
  return Call((p["jaxpr"],), is_inline=True, returns_weights=True, options=shardings)


def _closed(p: Any) -> Call:
  return Call((p["call_jaxpr"],), is_inline=True, returns_weights=True)


def _custom(p: Any) -> Call:
  return Call((p["call_jaxpr"],), has_rule=True)


def _checkpoint(p: Any) -> Call:
  options = {name: p[name] for name in ("prevent_cse", "policy")}
  return Call((p["jaxpr"],), returns_weights=True, options=options)


def _shard_map(p: Any) -> Call:
  options = {name: p[name] for name in ("mesh", "in_specs", "out_specs", "check_vma")}
  return Call((p["jaxpr"],), options={**options, "axis_names": p["newly_manual_axes"]})


def _scan(p: Any) -> Loop:
  if "ft_in" in p:
    consts, carry, _ = (len(part) for part in p["ft_in"].unpack())
  else:
    consts, carry = p["num_consts"], p["num_carry"]
  options = {name: p[name] for name in ("reverse", "unroll")}
  return Loop(None, p["jaxpr"], (0, consts, carry), p["length"], options)


def _while(p: Any) -> Loop:
  consts = p["cond_nconsts"], p["body_nconsts"]
  num_carry = len(open_jaxpr(p["body_jaxpr"])[0].outvars)
  return Loop(p["cond_jaxpr"], p["body_jaxpr"], (*consts, num_carry))


_CALLS: dict[str, Callable[[Any], Call | Loop]] = {
  "checkpoint": _checkpoint,
  "closed_call": _closed,
  "cond": lambda p: Call(tuple(p["branches"]), num_selectors=1),
  "core_call": _closed,
  "custom_jvp_call": _custom,
  "custom_vjp_call": _custom,
  "custom_vmap_call": lambda p: Call(
    (p["call"],), is_inline=True, returns_weights=True
  ),
  "jit": _jit,
  "pjit": _jit,
  "remat2": _checkpoint,
  "scan": _scan,
  "shard_map": _shard_map,
  "while": _while,
}


def call(eqn: Any) -> Any:
  """A Call or a Loop; None for a primitive that computes by itself."""
  describe = _CALLS.get(eqn.primitive.name)
  return None if describe is None else describe(eqn.params)


def rule_name(eqn: Any) -> str:
  """Whose derivative rule a custom_jvp or custom_vjp call follows, "custom_vjp 'f'"."""
  kind = eqn.primitive.name.removesuffix("_call")
  info = getattr(open_jaxpr(eqn.params["call_jaxpr"])[0], "debug_info", None)
  return f"{kind} {getattr(info, 'func_name', '?')!r}"


class Rule(NamedTuple):
  """A derivative rule as two programs.

  Attributes:
    fwd: the call's operands to its results, then what its bwd wants kept.
    bwd: what was kept, then the cotangents of the results that have one, to those of
      the operands that move; calls in it are run in place.
  """

  fwd: Any
  bwd: Any


def is_float(x: Any) -> bool:
  return jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)


def rule(eqn: Any, moves: Sequence[bool]) -> Rule:
  """The rule of a custom_jvp or custom_vjp call, as JAX itself applies it.

  Args:
    moves: for each operand, whether a derivative with respect to it is requested.
  """
  avals = [struct(v.aval) for v in eqn.invars]
  outs = [struct(v.aval) for v in eqn.outvars]
  kept: list[Any] = []

  def fwd(*operands):
    def call(*moving):
      return bind(eqn, _woven(moves, moving, still))

    moving, still = _apart(moves, operands)
    results, pull = jax.vjp(call, *moving)
    leaves, tree = jax.tree.flatten(pull)
    kept[:] = [tree, [struct(x) for x in leaves]]
    return results, leaves

  traced = jax.make_jaxpr(fwd)(*avals)
  tree, structs = kept

  def bwd(leaves, cotangents):
    given = iter(cotangents)
    full = [
      next(given) if is_float(x) else numpy.zeros(x.shape, jax.dtypes.float0)
      for x in outs
    ]
    return jax.tree.unflatten(tree, leaves)(full)

  return Rule(traced, _flat(jax.make_jaxpr(bwd)(structs, list(filter(is_float, outs)))))


def tangent(eqn: Any, moves: Sequence[bool]) -> Any:
  """The rule of a custom_jvp call as a program.

  Args:
    moves: for each operand, whether it has a tangent.

  Returns:
    a program from (the operands, the tangents of those that move) to (the results, the
    tangents of those that are floating).
  """
  avals = [struct(v.aval) for v in eqn.invars]

  def forward(operands, tangents):
    def call(*moving):
      return bind(eqn, _woven(moves, moving, still))

    moving, still = _apart(moves, operands)
    results, changes = jax.jvp(call, moving, tangents)
    pairs = zip(results, changes, strict=True)
    return results, [change for y, change in pairs if is_float(y)]

  return jax.make_jaxpr(forward)(avals, _apart(moves, avals)[0])


def transposed(eqn: Any, numbers: Sequence[int]) -> Any:
  """The transpose of an equation that is linear in the operands with these numbers.

  Returns:
    a program from (the result's cotangent, the other operands) to those operands'
    cotangents; calls in it are run in place.
  """
  avals = [struct(v.aval) for v in eqn.invars]
  is_linear = [i in numbers for i in range(len(avals))]

  def back(cotangent, *others):
    def part(*linear):
      (out,) = bind(eqn, _woven(is_linear, linear, others))
      return out

    return jax.linear_transpose(part, *linear)(cotangent)

  linear, others = _apart(is_linear, avals)
  return _flat(jax.make_jaxpr(back)(struct(eqn.outvars[0].aval), *others))


def spread(jaxpr: Any) -> dict[Any, tuple[int, ...]]:
  """Shapes of broadcast values, 1 on the axes along which they are constant."""
  found: dict[Any, tuple[int, ...]] = {}
  for eqn in open_jaxpr(jaxpr)[0].eqns:
    if eqn.primitive.name == "broadcast_in_dim":
      source, (out,) = eqn.invars[0], eqn.outvars
      sizes = zip(
        eqn.params["broadcast_dimensions"], _spread_of(source, found), strict=True
      )
      shape = dict.fromkeys(range(len(out.aval.shape)), 1) | dict(sizes)
      found[out] = tuple(shape.values())
    elif eqn.primitive.name == "convert_element_type":
      found[eqn.outvars[0]] = _spread_of(eqn.invars[0], found)
  return found


def _spread_of(atom: Any, found: Mapping[Any, tuple[int, ...]]) -> tuple[int, ...]:
  shape = tuple(atom.aval.shape)
  return shape if isinstance(atom, Literal) else found.get(atom, shape)


def shards(x: Any) -> list[str]:
  """The manual mesh axes over which a value differs from shard to shard."""
  aval = jax.typeof(x)
  varying = aval.mat.varying if hasattr(aval, "mat") else aval.vma
  return sorted(varying)


def struct(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _apart(chosen, values) -> tuple[list[Any], list[Any]]:
  """The values that are chosen, and the others."""
  pairs = list(zip(chosen, values, strict=True))
  return [x for c, x in pairs if c], [x for c, x in pairs if not c]


def _woven(chosen, ones, others) -> list[Any]:
  """Puts together what `_apart` took apart."""
  first, second = iter(ones), iter(others)
  return [next(first) if c else next(second) for c in chosen]


def _flat(jaxpr: Any) -> Any:
  """Inlines the calls of a program."""

  def run(jaxpr, values):
    open_, consts = open_jaxpr(jaxpr)
    env = dict(zip(open_.constvars, consts, strict=True))
    env.update(zip(open_.invars, values, strict=True))
    for eqn in open_.eqns:
      given = [a.val if isinstance(a, Literal) else env[a] for a in eqn.invars]
      found = call(eqn)
      in_place = isinstance(found, Call) and found.is_inline
      results = run(found.bodies[0], given) if in_place else bind(eqn, given)
      env.update(zip(eqn.outvars, results, strict=True))
    return [a.val if isinstance(a, Literal) else env[a] for a in open_.outvars]

  avals = [struct(v.aval) for v in open_jaxpr(jaxpr)[0].invars]
  return jax.make_jaxpr(lambda *xs: run(jaxpr, xs))(*avals)
