"""The transform: a function of frozen params becomes one of (params, adapter)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorax_flax.adapt import contract, view_rules
from lorax_flax.adapt import jaxpr as jx
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import PyTree, flatten, path_key
from lorax_flax.adapt.plan import Plan, make_plan, start
from lorax_flax.adapt.view import Dim, View, is_view
from lorax_flax.adapt.view_rules import Unsupported
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.methods import Adapter, LoRA, Tuned

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapted:
  """A function with low-rank deltas beside its weights. See `adapt`."""

  apply_fn: Callable[..., Any]
  config: LoraConfig

  def plan(self, params: PyTree, *args, **kwargs) -> Plan:
    """What the config means for this function; arguments may be ShapeDtypeStructs."""
    traced = _trace(self.apply_fn, params, args, kwargs)
    return make_plan(self.config, traced.jaxpr, traced.leaves, traced.num_args)

  def init(self, key: jax.Array, params: PyTree, *args, **kwargs) -> Adapter:
    """An adapter that changes nothing yet.

    Args:
      key: a PRNG key; each path's start depends on (key, path) alone.
      params: the base.
      args, kwargs: arguments to trace the function with, arrays or ShapeDtypeStructs.

    Returns:
      dict of path to LoRA or Tuned.
    """
    return start(self.plan(params, *args, **kwargs), key, flatten(params))

  def apply(
    self,
    params: PyTree,
    adapter: Adapter,
    *args,
    dropout_key: jax.Array | None = None,
    **kwargs,
  ) -> Any:
    """apply_fn(params with the deltas, *args, **kwargs), the sums never formed.

    Args:
      dropout_key: LoRA's dropout acts only where a key is given.
    """
    leaves = flatten(params)
    for path in adapter:
      if path not in leaves:
        raise LoraxError(unknown("adapter path", path, leaves))
    params = _with_tuned(params, adapter)
    traced = _trace(self.apply_fn, params, args, kwargs)
    run = _Run(dropout_key, self.config.on_unsupported == "materialize")
    operands = list(traced.values)
    for i, path in enumerate(traced.leaves):
      delta = adapter.get(path)
      if isinstance(delta, LoRA):
        operands[i] = _view(path, operands[i], delta)
    jaxpr, consts = jx.open_jaxpr(traced.jaxpr)
    results = [
      run.materialize("output", x) if is_view(x) else x
      for x in run.jaxpr(jaxpr, consts, operands)
    ]
    lost = [p for p, d in adapter.items() if isinstance(d, LoRA) and p not in run.used]
    if lost:
      raise LoraxError(
        f"the adapter's delta of {', '.join(map(repr, lost))} is never used by the"
        " function"
      )
    return jax.tree.unflatten(traced.out_tree, results)


def adapt(apply_fn: Callable[..., Any], config: LoraConfig) -> Adapted:
  """Puts low-rank deltas beside the weights of a function.

  The function is traced to a jaxpr, the targeted weights are followed through it, and
  where one is consumed, x W becomes x W + scale (x a) b. Neither W + delta nor a dense
  gradient of W is ever formed. The result composes with jit, grad, vmap, remat, scan.

  Args:
    apply_fn: fn(params, *args, **kwargs), `params` any pytree of arrays: a Linen
      module's apply, a function that merges an NNX graph, or any JAX function.
    config: targets, ranks, scales.

  >>> import jax, jax.numpy as jnp
  >>> import lorax_flax as lx
  >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
  >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
  >>> lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up", "down"]))
  >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 3)))
  >>> sorted(adapter), adapter["up"].a.shape, adapter["up"].b.shape
  (['down', 'up'], (3, 2), (2, 8))
  >>> x = jnp.ones((1, 3))
  >>> bool((lora.apply(params, adapter, x) == fn(params, x)).all())
  True
  """
  return Adapted(apply_fn, config)


@dataclass(frozen=True)
class _Traced:
  jaxpr: Any
  leaves: dict[str, Any]  # path to leaf of params
  values: list[Any]  # operands of the jaxpr: the leaves, then the arrays among the args
  num_args: int
  out_tree: Any


def _is_array(x: Any) -> bool:
  return hasattr(x, "shape") and hasattr(x, "dtype")


def _trace(fn, params, args, kwargs) -> _Traced:
  """Traces fn; arguments that are not arrays (flags, names) stay Python values."""
  leaves = flatten(params)
  if len(leaves) != len(jax.tree.leaves(params)):
    raise LoraxError("two leaves of params have the same path")
  rest, rest_tree = jax.tree.flatten((args, kwargs))
  arrays = [x for x in rest if _is_array(x)]
  params_tree = jax.tree.structure(params)

  def flat(leaf_values, array_values):
    given = iter(array_values)
    merged = [next(given) if _is_array(x) else x for x in rest]
    inner_args, inner_kwargs = jax.tree.unflatten(rest_tree, merged)
    inner = jax.tree.unflatten(params_tree, leaf_values)
    return fn(inner, *inner_args, **inner_kwargs)

  values = list(leaves.values())
  jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(values, arrays)
  return _Traced(
    jaxpr, leaves, [*values, *arrays], len(arrays), jax.tree.structure(shapes)
  )


def _with_tuned(params: PyTree, adapter: Adapter) -> PyTree:
  leaves, tree = jax.tree.flatten(params)
  for i, (path, leaf) in enumerate(flatten(params).items()):
    delta = adapter.get(path)
    if isinstance(delta, Tuned):
      if delta.value.shape != leaf.shape:
        raise LoraxError(
          f"tuned {path!r} has shape {delta.value.shape}, the base {leaf.shape}"
        )
      leaves[i] = delta.value
  return jax.tree.unflatten(tree, leaves)


def _view(path: str, value: Any, delta: LoRA) -> View:
  if len(delta.roles) != value.ndim:
    raise LoraxError(
      f"the adapter's delta of {path!r} is for {len(delta.roles)} axes, the base has"
      f" shape {value.shape}"
    )
  a, b = delta.factors(value.shape)
  for i, n in enumerate(value.shape):
    if max(a.shape[i], b.shape[i]) != n:
      raise LoraxError(
        f"the adapter's delta of {path!r} has size {max(a.shape[i], b.shape[i])} on"
        f" axis {i}, the base has shape {value.shape}"
      )
  dims = tuple(Dim(frozenset({(path, i)}), role) for i, role in enumerate(delta.roles))
  return View(value, a, b, jnp.int32(0), path, dims, delta.dropout)


@dataclass
class _Run:
  """One rewritten evaluation of a jaxpr: what it was given, what it has met."""

  dropout_key: jax.Array | None
  may_materialize: bool
  used: set[str] = field(default_factory=set)
  sites: dict[str, int] = field(default_factory=dict)

  def jaxpr(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> list:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom):
      return atom.val if isinstance(atom, jx.Literal) else env[atom]

    for eqn in jaxpr.eqns:
      results = self.equation(eqn, [read(a) for a in eqn.invars])
      env.update(zip(eqn.outvars, results, strict=True))
    return [read(a) for a in jaxpr.outvars]

  def closed(self, jaxpr: Any, operands: Sequence[Any]) -> list:
    return self.jaxpr(*jx.open_jaxpr(jaxpr), operands)

  def equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
    views = [x for x in operands if is_view(x)]
    if not views:
      return jx.bind(eqn, operands)
    name = eqn.primitive.name
    try:
      if jx.inlined(eqn) is not None:
        return _inline(self, eqn, operands)
      if name in CALLS:
        return CALLS[name](self, eqn, operands)
      values = [x.value if is_view(x) else x for x in operands]
      if name in view_rules.RULES:
        with jx.scope(eqn):
          results = jx.bind(eqn, values)
          return list(view_rules.RULES[name](eqn, operands, results))
      if name in contract.RULES:
        contract.axes_of(eqn, operands)
        (base,) = jx.bind(eqn, values)
        with jx.scope(eqn):
          result = contract.RULES[name](eqn, operands, base, self.drop)
        self.used |= views[0].paths()
        return [result]
    except Unsupported as e:
      why = str(e)
    else:
      why = "it has no rule"
    dense = [self.materialize(name, x, why) if is_view(x) else x for x in operands]
    return jx.bind(eqn, dense)

  def materialize(self, primitive: str, view: View, why: str = "it has no rule") -> Any:
    """W + delta, where that was allowed; otherwise an error that names both."""
    if not self.may_materialize:
      raise LoraxError(
        f"{view.path!r} reaches {primitive!r}, where a delta cannot follow: {why}."
        " Exclude it, or pass on_unsupported='materialize' to form W + delta there"
      )
    log.warning("forming W + delta of %r for %r: %s", view.path, primitive, why)
    self.used |= view.paths()
    return view.dense()

  def drop(self, view: View, x: jax.Array) -> jax.Array:
    """LoRA's dropout of x, of its own for each use and place in the program."""
    if self.dropout_key is None or view.dropout == 0.0:
      return x
    # Uses are told apart within one place of a stack: a loop over the layers of a
    # stacked weight numbers its uses as a scan over it does.
    index = view.index
    static = not isinstance(index, jax.core.Tracer)
    place = f"{view.path}#{int(index)}" if static else view.path
    site = self.sites[place] = self.sites.get(place, -1) + 1
    key = path_key(self.dropout_key, f"{view.path}:{site}")
    keep = jax.random.bernoulli(
      jax.random.fold_in(key, index), 1.0 - view.dropout, x.shape
    )
    return jnp.where(keep, x / (1.0 - view.dropout), jnp.zeros((), x.dtype)).astype(
      x.dtype
    )

  def plain(self, primitive: str, values: Sequence[Any]) -> list[Any]:
    why = "it hands the weight on as a result"
    return [self.materialize(primitive, v, why) if is_view(v) else v for v in values]


def _inline(run: _Run, eqn: Any, operands: list[Any]) -> list[Any]:
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


def _scan(run: _Run, eqn: Any, operands: list[Any]) -> list[Any]:
  s = jx.scan(eqn)
  n = s.num_consts
  consts, carry = operands[:n], operands[n : n + s.num_carry]
  scanned = [_stacked(x, s.length) for x in operands[n + s.num_carry :]]
  arrays = [(x.value, x.a, x.b) if is_view(x) else x for x in scanned]

  def body(state, step):
    i, *slices = step
    here = [
      replace(_filled(x, parts), index=x.index * s.length + i, dims=x.dims[1:])
      if is_view(x)
      else parts
      for x, parts in zip(scanned, slices, strict=True)
    ]
    outer = [_repeat(x, i, s.length) for x in (*consts, *state)]
    results = run.closed(s.body, [*outer, *here])
    new = _back(state, results[: s.num_carry])
    # A weight may be handed out as it came (NNX hands out its state), stacked then.
    handed[:] = results[s.num_carry :]
    return new, [(y.value, y.a, y.b) if is_view(y) else y for y in handed]

  handed: list[Any] = []
  counter = jnp.arange(s.length, dtype=jnp.int32)
  new, ys = lax.scan(
    body, list(carry), [counter, *arrays], s.length, s.reverse, s.unroll
  )
  ys = [
    replace(
      _filled(y, parts),
      index=jnp.int32(0),
      dims=(Dim(frozenset(), "stack"), *y.dims),
    )
    if is_view(y)
    else parts
    for y, parts in zip(handed, ys, strict=True)
  ]
  return [*new, *ys]


def _filled(x: View, parts: Sequence[Any]) -> View:
  value, a, b = parts
  return replace(x, value=value, a=a, b=b)


def _stacked(x: Any, length: int) -> Any:
  """A scanned weight whose factors both have the scanned axis."""
  if not is_view(x):
    return x
  if x.dims[0].role not in ("stack", None):
    raise Unsupported(f"a scan over an axis with the role {x.dims[0].role!r}")
  parts = (jnp.broadcast_to(t, (length, *t.shape[1:])) for t in (x.a, x.b))
  a, b = parts
  return replace(x, a=a, b=b)


def _while(run: _Run, eqn: Any, operands: list[Any]) -> list[Any]:
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


def _cond(run: _Run, eqn: Any, operands: list[Any]) -> list[Any]:
  index, *rest = operands
  branches = [
    lambda *xs, branch=branch: run.plain("cond", run.closed(branch, xs))
    for branch in eqn.params["branches"]
  ]
  return lax.switch(index, branches, *rest)


def _remat(run: _Run, eqn: Any, operands: list[Any]) -> list[Any]:
  p = eqn.params

  def body(*xs):
    # NNX hands a layer's state out again: a weight may leave as it came.
    return run.closed(p["jaxpr"], xs)

  fn = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])
  return fn(*operands)


def _shard_map(run: _Run, eqn: Any, operands: list[Any]) -> list[Any]:
  """Factors are sharded as the weight is, on the axes that they carry."""
  p = eqn.params

  def spec_of(x, spec):
    if not is_view(x):
      return spec
    names = tuple(spec) + (None,) * (len(x.dims) - len(spec))

    def factor(t):
      on = [name if n != 1 else None for name, n in zip(names, t.shape, strict=False)]
      return PartitionSpec(*on)

    return replace(x, value=spec, a=factor(x.a), b=factor(x.b), index=PartitionSpec())

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
