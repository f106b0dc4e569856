"""All that we know of how JAX encodes a program.

The encoding changes between releases: from 0.10 to 0.12 ClosedJaxpr merged into Jaxpr,
and scan's `num_consts` and `num_carry` became `ft_in`. Nothing outside this file reads
an equation's parameters by a name that has changed, so a new release is met here.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
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
  if name in ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"):
    return p["call_jaxpr"]
  return None


def jit_shardings(eqn: Any) -> tuple[list[Any], list[Any]]:
  """Shardings that a jit asks of its operands and results; None where it asks none."""

  def given(shardings):
    return [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]

  if eqn.primitive.name not in ("jit", "pjit"):
    return [None] * len(eqn.invars), [None] * len(eqn.outvars)
  return given(eqn.params["in_shardings"]), given(eqn.params["out_shardings"])


def jvp_rule(eqn: Any, nonzero: Sequence[bool]) -> tuple[Any, list[Any], list[bool]]:
  """A custom_jvp's rule for operands of which `nonzero` have a tangent.

  Returns:
    (jaxpr, consts, which results have a zero tangent). The jaxpr maps the operands
    after num_consts and their non-zero tangents to the results and their tangents.
  """
  zeros = [not n for n in nonzero]
  jaxpr, consts, out_zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*zeros)
  return jaxpr, list(consts), list(out_zeros)
