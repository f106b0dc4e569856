"""All that we know of how JAX encodes a program.

The encoding changes between releases: from 0.10 to 0.12 ClosedJaxpr merged into Jaxpr,
and scan's `num_consts` and `num_carry` became `ft_in`. Nothing outside this file reads
an equation's parameters by a name that has changed, so a new release is met here.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy
from jax.extend import core as jex

Literal = jex.Literal


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
  """The open jaxpr and the values of its constants, of either kind of jaxpr."""
  return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Runs one equation on `values`, as it stands; its results as a list."""
  prepared = eqn.primitive.get_bind_params(eqn.params)
  subfuns, params = prepared if isinstance(prepared, tuple) else ((), prepared)
  with eqn.ctx.manager, scope(eqn):
    out = eqn.primitive.bind(*subfuns, *values, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def scope(eqn: Any) -> Any:
  """The names (of modules, say) under which profiles show the equation."""
  name = str(eqn.source_info.name_stack)
  return jax.named_scope(name) if name else contextlib.nullcontext()


def is_dropped(var: Any) -> bool:
  return isinstance(var, jex.DropVar)


class Scan(NamedTuple):
  """A scan's parts: its operands are consts, then carry, then scanned inputs."""

  body: Any
  num_consts: int
  num_carry: int
  length: int
  reverse: bool
  unroll: int


def scan(eqn: Any) -> Scan:
  p = eqn.params
  if "ft_in" in p:
    consts, carry, _ = (len(part) for part in p["ft_in"].unpack())
  else:
    consts, carry = p["num_consts"], p["num_carry"]
  return Scan(p["jaxpr"], consts, carry, p["length"], p["reverse"], p["unroll"])


class While(NamedTuple):
  """A while's parts: its operands are cond consts, body consts, then carry."""

  cond: Any
  body: Any
  num_cond_consts: int
  num_body_consts: int


def while_(eqn: Any) -> While:
  p = eqn.params
  return While(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])


def inlined(eqn: Any) -> Any | None:
  """The body of a call that can be run in place: same operands, same results."""
  name, p = eqn.primitive.name, eqn.params
  if name in ("jit", "pjit"):
    return p["jaxpr"]
  if name in ("closed_call", "core_call"):
    return p["call_jaxpr"]
  return None


def ruled(eqn: Any) -> Any | None:
  """The body of a call that has a derivative rule of its own."""
  ruled = eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call")
  return eqn.params["call_jaxpr"] if ruled else None


def jit_shardings(eqn: Any) -> tuple[list[Any], list[Any]]:
  """Shardings that a jit asks of its operands and results; None where it asks none."""

  def given(shardings):
    return [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]

  if eqn.primitive.name not in ("jit", "pjit"):
    return [None] * len(eqn.invars), [None] * len(eqn.outvars)
  return given(eqn.params["in_shardings"]), given(eqn.params["out_shardings"])


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
    moves: for each operand, whether a derivative with respect to it is wanted.
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
    whole = [
      next(given) if is_float(x) else numpy.zeros(x.shape, jax.dtypes.float0)
      for x in outs
    ]
    return jax.tree.unflatten(tree, leaves)(whole)

  return Rule(traced, _flat(jax.make_jaxpr(bwd)(structs, list(filter(is_float, outs)))))


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
  """The same program with its calls run in place."""

  def run(jaxpr, values):
    open_, consts = open_jaxpr(jaxpr)
    env = dict(zip(open_.constvars, consts, strict=True))
    env.update(zip(open_.invars, values, strict=True))
    for eqn in open_.eqns:
      given = [a.val if isinstance(a, Literal) else env[a] for a in eqn.invars]
      body = inlined(eqn)
      results = bind(eqn, given) if body is None else run(body, given)
      env.update(zip(eqn.outvars, results, strict=True))
    return [a.val if isinstance(a, Literal) else env[a] for a in open_.outvars]

  avals = [struct(v.aval) for v in open_jaxpr(jaxpr)[0].invars]
  return jax.make_jaxpr(lambda *xs: run(jaxpr, xs))(*avals)
