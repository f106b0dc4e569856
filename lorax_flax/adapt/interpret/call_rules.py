"""Calls that a weight goes into: each is rebuilt around the weight and its delta."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, Sharding

from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.interpret.view import Dim, is_view
from lorax_flax.adapt.interpret.weights import is_stored


def programs(run: Any, eqn: Any, call: jx.Call) -> list[Callable[..., list[Any]]]:
  """The call's bodies as functions of operands among which there are weights."""

  def program(body):
    def results(*operands):
      if call.is_inline:
        return run.jaxpr(*jx.open_jaxpr(body), operands)
      results = run.closed(body, operands)
      name = eqn.primitive.name
      return results if call.returns_weights else run.plain(name, results)

    return results

  return [program(body) for body in call.bodies]


def _inline(run: Any, eqn: Any, call: jx.Call, operands: list[Any]) -> list[Any]:
  """A call's body in place, under the shardings that the call asks for."""
  operands = _constrained(operands, call.options.get("in_shardings"))
  with jx.scope(eqn):
    results = programs(run, eqn, call)[0](*operands)
  return _constrained(results, call.options.get("out_shardings"))


def _constrained(values: list[Any], shardings: Sequence[Any] | None) -> list[Any]:
  """Values under the shardings that a jit requests; it may leave one unspecified."""

  def constrain(x, sharding):
    # Stored arrays have shardings of their own.
    if not isinstance(sharding, Sharding) or (is_view(x) and is_stored(x.value)):
      return x
    if is_view(x):
      return replace(x, value=lax.with_sharding_constraint(x.value, sharding))
    return lax.with_sharding_constraint(x, sharding)

  return values if shardings is None else list(map(constrain, values, shardings))


def _cond(run: Any, eqn: Any, call: jx.Call, operands: list[Any]) -> list[Any]:
  index, *rest = operands
  return lax.switch(index, programs(run, eqn, call), *rest)


def _remat(run: Any, eqn: Any, call: jx.Call, operands: list[Any]) -> list[Any]:
  (body,) = programs(run, eqn, call)
  return jax.checkpoint(body, **call.options)(*operands)


def _shard_map(run: Any, eqn: Any, call: jx.Call, operands: list[Any]) -> list[Any]:
  """Factors are sharded as the weight is, on the axes that they carry."""
  operands = [x.settled() if is_view(x) else x for x in operands]

  def spec_of(x, spec):
    if not is_view(x):
      return spec
    names = tuple(spec) + (None,) * (len(x.dims) - len(spec))
    split = [d.role for d, name in zip(x.dims, names, strict=True) if name]
    if x.bias is not None and "in" in split:
      raise Unsupported("its inputs are sharded, and it has a bias of its own")

    def factor(t):
      on = [name if n != 1 else None for name, n in zip(names, t.shape, strict=False)]
      return PartitionSpec(*on)

    replicated = jax.tree.map(lambda _: PartitionSpec(), (x.index, x.choice))
    specs = x.on_all(factor, spec, x.dims)
    return replace(specs, index=replicated[0], choice=replicated[1])

  (body,) = programs(run, eqn, call)
  if not call.options["check_vma"]:
    # Values do not tell there which axes they vary over: the specs do.
    axes = {name for spec in call.options["in_specs"] for name in _names(spec)}
    body = _told_apart(body, sorted(axes))
  specs = map(spec_of, operands, call.options["in_specs"])
  options = {
    **call.options,
    "in_specs": tuple(specs),
    "out_specs": tuple(call.options["out_specs"]),
  }
  with jx.scope(eqn):
    return list(jax.shard_map(lambda *xs: tuple(body(*xs)), **options)(*operands))


def in_shard(index: Any, axes: Sequence[str]) -> Any:
  """A place in the program as each shard along these mesh axes numbers it."""
  for name in axes:
    index = index * lax.axis_size(name) + lax.axis_index(name)
  return index


def _told_apart(body: Callable, axes: Sequence[str]) -> Callable:
  """The body, given weights whose place in the program tells the shard."""

  def told(*operands):
    return body(
      *(
        replace(x, index=in_shard(x.index, axes)) if is_view(x) else x for x in operands
      )
    )

  return told


def _names(spec: PartitionSpec) -> list[str]:
  """The mesh axes of a spec."""
  entries = ((e,) if isinstance(e, str) else e or () for e in spec)
  return [name for names in entries for name in names]


def _repeat(x: Any, i: jax.Array, length: int) -> Any:
  """A weight as iteration i of `length` sees it."""
  return replace(x, index=x.index * length + i) if is_view(x) else x


def _back(outer: Sequence[Any], inner: Sequence[Any]) -> list[Any]:
  """Carried weights as they came in; a weight that changed cannot be carried."""
  out = []
  for before, after in zip(outer, inner, strict=True):
    structures: list[Any] = [jax.tree.structure(x) for x in (before, after)]
    if structures[0] != structures[1]:
      raise Unsupported("it changes the weight from one iteration to the next")
    out.append(replace(after, index=before.index) if is_view(before) else after)
  return out


def _scan(run: Any, eqn: Any, loop: jx.Loop, operands: list[Any]) -> list[Any]:
  _, consts, carry, scanned = loop.split(operands)
  length = loop.length
  scanned = [_stacked(_sliceable(x), length) for x in scanned]
  arrays = [x.parts if is_view(x) else x for x in scanned]

  def body(state, step):
    i, *slices = step
    here = [
      replace(x.with_parts(parts), index=x.index * length + i, dims=x.dims[1:])
      if is_view(x)
      else parts
      for x, parts in zip(scanned, slices, strict=True)
    ]
    outer = [_repeat(x, i, length) for x in (*consts, *state)]
    results = run.closed(loop.body, [*outer, *here])
    new = _back(state, results[: len(carry)])
    # A weight may be handed out as it came (NNX hands out its state), stacked then.
    handed[:] = map(_sliceable, results[len(carry) :])
    return new, [y.parts if is_view(y) else y for y in handed]

  handed: list[Any] = []
  counter = jnp.arange(length, dtype=jnp.int32)
  new, ys = lax.scan(body, carry, [counter, *arrays], length, **loop.options)
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


def _sliceable(x: Any) -> Any:
  """A weight of whose arrays each has the axes of W before its last two."""
  has_steps = is_view(x) and is_stored(x.value) and not x.value.is_sliceable
  return x.settled() if has_steps else x


def _stacked(x: Any, length: int) -> Any:
  """A scanned weight whose factors both have the scanned axis."""
  if not is_view(x):
    return x
  if x.dims[0].role not in ("stack", None):
    raise Unsupported(f"a scan over an axis with the role {x.dims[0].role!r}")
  return x.on_all(
    lambda t: jnp.broadcast_to(t, (length, *t.shape[1:])), x.value, x.dims
  )


def _while(run: Any, eqn: Any, loop: jx.Loop, operands: list[Any]) -> list[Any]:
  cond_consts, consts, carry, _ = loop.split(operands)

  # The number of iterations is not known: each counts on from the place it stands at.
  def cond(state):
    i, *values = state
    values = [_repeat(x, i, 1) for x in (*cond_consts, *values)]
    return run.plain("while", run.closed(loop.cond, values))[0]

  def body(state):
    i, *values = state
    inner = [_repeat(x, i, 1) for x in (*consts, *values)]
    return [i + 1, *_back(values, run.closed(loop.body, inner))]

  return lax.while_loop(cond, body, [jnp.int32(0), *carry])[1:]


RULES: dict[str, Callable[[Any, Any, Any, list[Any]], list[Any]]] = {
  "checkpoint": _remat,
  "closed_call": _inline,
  "cond": _cond,
  "core_call": _inline,
  "custom_vmap_call": _inline,
  "jit": _inline,
  "pjit": _inline,
  "remat2": _remat,
  "scan": _scan,
  "shard_map": _shard_map,
  "while": _while,
}
