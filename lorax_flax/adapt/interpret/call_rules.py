"""Calls that a weight goes into: each is rebuilt around the weight and its delta."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.interpret.view import Dim, is_view


def inline(run: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  """A call's body in place, under the shardings that the call asks for."""
  wanted, given = jx.jit_shardings(eqn)

  def constrain(x, sharding):
    if sharding is None:
      return x
    if is_view(x):
      return replace(x, value=lax.with_sharding_constraint(x.value, sharding))
    return lax.with_sharding_constraint(x, sharding)

  operands = [constrain(x, s) for x, s in zip(operands, wanted, strict=True)]
  with jx.scope(eqn):
    results = run.closed(jx.inlined(eqn), operands)
  return [constrain(x, s) for x, s in zip(results, given, strict=True)]


def _repeat(x: Any, i: jax.Array, length: int) -> Any:
  """A weight as iteration i of `length` sees it."""
  return replace(x, index=x.index * length + i) if is_view(x) else x


def _back(outer: Sequence[Any], inner: Sequence[Any]) -> list[Any]:
  """Carried weights as they came in; a weight that changed cannot be carried."""
  out = []
  for before, after in zip(outer, inner, strict=True):
    if is_view(before) != is_view(after) or (
      is_view(before) and (before.dims, before.path) != (after.dims, after.path)
    ):
      raise Unsupported("it changes the weight from one iteration to the next")
    out.append(replace(after, index=before.index) if is_view(before) else after)
  return out


def _scan(run: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  s = jx.scan(eqn)
  n = s.num_consts
  consts, carry = operands[:n], operands[n : n + s.num_carry]
  scanned = [_stacked(x, s.length) for x in operands[n + s.num_carry :]]
  arrays = [x.parts if is_view(x) else x for x in scanned]

  def body(state, step):
    i, *slices = step
    here = [
      replace(x.with_parts(parts), index=x.index * s.length + i, dims=x.dims[1:])
      if is_view(x)
      else parts
      for x, parts in zip(scanned, slices, strict=True)
    ]
    outer = [_repeat(x, i, s.length) for x in (*consts, *state)]
    results = run.closed(s.body, [*outer, *here])
    new = _back(state, results[: s.num_carry])
    # A weight may be handed out as it came (NNX hands out its state), stacked then.
    handed[:] = results[s.num_carry :]
    return new, [y.parts if is_view(y) else y for y in handed]

  handed: list[Any] = []
  counter = jnp.arange(s.length, dtype=jnp.int32)
  new, ys = lax.scan(
    body, list(carry), [counter, *arrays], s.length, s.reverse, s.unroll
  )
  ys = [
    replace(
      y.with_parts(parts),
      index=jnp.int32(0),
      dims=(Dim(frozenset(), "stack"), *y.dims),
    )
    if is_view(y)
    else parts
    for y, parts in zip(handed, ys, strict=True)
  ]
  return [*new, *ys]


def _stacked(x: Any, length: int) -> Any:
  """A scanned weight whose factors both have the scanned axis."""
  if not is_view(x):
    return x
  if x.dims[0].role not in ("stack", None):
    raise Unsupported(f"a scan over an axis with the role {x.dims[0].role!r}")
  return x.on_all(
    lambda t: jnp.broadcast_to(t, (length, *t.shape[1:])), x.value, x.dims
  )


def _while(run: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  w = jx.while_(eqn)
  n, m = w.num_cond_consts, w.num_body_consts
  cond_consts, body_consts, carry = operands[:n], operands[n : n + m], operands[n + m :]

  # The number of iterations is not known: each counts on from the place it stands at.
  def cond(state):
    i, *values = state
    values = [_repeat(x, i, 1) for x in (*cond_consts, *values)]
    return run.plain("while", run.closed(w.cond, values))[0]

  def body(state):
    i, *values = state
    inner = [_repeat(x, i, 1) for x in (*body_consts, *values)]
    return [i + 1, *_back(values, run.closed(w.body, inner))]

  return lax.while_loop(cond, body, [jnp.int32(0), *carry])[1:]


def _cond(run: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  index, *rest = operands
  branches = [
    lambda *xs, branch=branch: run.plain("cond", run.closed(branch, xs))
    for branch in eqn.params["branches"]
  ]
  return lax.switch(index, branches, *rest)


def _remat(run: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params

  def body(*xs):
    # NNX hands a layer's state out again: a weight may leave as it came.
    return run.closed(p["jaxpr"], xs)

  fn = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])
  return fn(*operands)


def _shard_map(run: Any, eqn: Any, operands: list[Any]) -> list[Any]:
  """Factors are sharded as the weight is, on the axes that they carry."""
  p = eqn.params

  def spec_of(x, spec):
    if not is_view(x):
      return spec
    names = tuple(spec) + (None,) * (len(x.dims) - len(spec))
    split = [d.role for d, name in zip(x.dims, names, strict=True) if name]
    if x.bias is not None and "in" in split:
      raise Unsupported("its inputs are split, and it has a bias of its own")

    def factor(t):
      on = [name if n != 1 else None for name, n in zip(names, t.shape, strict=False)]
      return PartitionSpec(*on)

    return replace(x.on_all(factor, spec, x.dims), index=PartitionSpec())

  def body(*xs):
    return tuple(run.plain("shard_map", run.closed(p["jaxpr"], xs)))

  fn = jax.shard_map(
    body,
    mesh=p["mesh"],
    in_specs=tuple(spec_of(x, s) for x, s in zip(operands, p["in_specs"], strict=True)),
    out_specs=tuple(p["out_specs"]),
    axis_names=p["newly_manual_axes"],
    check_vma=p["check_vma"],
  )
  return list(fn(*operands))


CALLS = {
  "checkpoint": _remat,
  "cond": _cond,
  "remat2": _remat,
  "scan": _scan,
  "shard_map": _shard_map,
  "while": _while,
}
