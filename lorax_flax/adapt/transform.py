"""The transform: a function of frozen params becomes one of (params, adapter)."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret.interpreter import Run
from lorax_flax.adapt.interpret.view import Dim, View, is_view
from lorax_flax.adapt.interpret.weights import Stored
from lorax_flax.adapt.partition import combine, partition, trainable_mask
from lorax_flax.adapt.paths import PyTree, arrays, beside, flatten, is_array
from lorax_flax.adapt.plan import Plan, abstract_start, make_plan, start
from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.methods import Adapter, Followed, Parts
from lorax_flax.methods.probe import Observe
from lorax_flax.quant import dense, is_quantized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapted:
  """A function with low-rank deltas beside its weights. See `adapt`."""

  apply_fn: Callable[..., Any]
  config: LoraConfig

  def plan(self, params: PyTree, /, *args, **kwargs) -> Plan:
    """The config's meaning for this function; arguments may be ShapeDtypeStructs."""
    traced = _trace(self.apply_fn, params, args, kwargs)
    plan, to_try = make_plan(self.config, traced.jaxpr, traced.leaves, traced.num_args)
    if to_try and self.config.on_unsupported == "error":
      self._check(plan, to_try, traced)
    return plan

  def _check(self, plan: Plan, paths: Sequence[str], traced: "_Traced") -> None:
    """Refuses deltas with which the function can't be run or differentiated.

    Both are traced for their shapes. What JAX refuses to differentiate without any
    delta as well (a while loop) may still be run.
    """
    adapter = abstract_start(plan, traced.leaves)
    followed = {p: adapter[p] for p in paths if isinstance(adapter[p], Followed)}
    trained, rest = partition(followed, trainable_mask(followed))

    def gradient(trained, rest, values, key):
      def run(trained):
        return self._evaluated(traced, values, combine(trained, rest), key)

      results, pull = jax.vjp(run, trained)
      return pull(list(map(_cotangent, results)))

    key = jax.eval_shape(lambda: jax.random.key(0)) if plan.dropout else None
    try:
      jax.eval_shape(gradient, trained, rest, traced.values, key)
    except LoraxError:
      raise
    except (NotImplementedError, TypeError, ValueError) as e:
      log.debug("the gradient can't be traced: %s", e)

  def init(self, key: jax.Array, params: PyTree, /, *args, **kwargs) -> Adapter:
    """An adapter that changes nothing yet.

    Args:
      key: a PRNG key; each path's start depends on (key, path) alone.
      params: the base.
      args, kwargs: arguments to trace the function with, arrays or ShapeDtypeStructs.

    Returns:
      dict of path to delta: of the config's method, Rows, or Tuned.
    """
    return start(self.plan(params, *args, **kwargs), key, arrays(params))

  def apply(
    self,
    params: PyTree,
    adapter: Adapter,
    /,
    *args,
    lora_dropout_key: jax.Array | None = None,
    **kwargs,
  ) -> Any:
    """apply_fn(params with the deltas, *args, **kwargs), the sums never formed.

    Args:
      lora_dropout_key: LoRA's dropout acts only where a key is given. `dropout_key`
        means the same to a function that has no argument of that name.

    Raises:
      LoraxError: a delta that doesn't fit or isn't used; `dropout_key` where both the
        function and LoRA's dropout could take it.
    """
    if "dropout_key" in kwargs and not _takes(self.apply_fn, "dropout_key"):
      lora_dropout_key = kwargs.pop("dropout_key")
    elif kwargs.get("dropout_key") is not None and lora_dropout_key is None:
      _check_no_dropout(adapter)
    traced = self._traced(params, adapter, args, kwargs)
    results = self._evaluated(traced, traced.values, adapter, lora_dropout_key)
    return jax.tree.unflatten(traced.out_tree, results)

  def apply_part(self, params: PyTree, adapter: Adapter, /, *args, **kwargs) -> Any:
    """`apply` of a function that may leave deltas unused, without dropout.

    It is for functions that compute a part of a model at a time, as a decoder's step
    does whose encoder ran before.
    """
    traced = self._traced(params, adapter, args, kwargs)
    results, _ = self._run(traced, traced.values, adapter, None)
    return jax.tree.unflatten(traced.out_tree, results)

  def observed(
    self, params: PyTree, adapter: Adapter, observe: Observe, /, *args, **kwargs
  ) -> list[Any]:
    """The flat results of a call, each product with a first factor shown to `observe`.

    Args:
      adapter: followed deltas alone.
    """
    traced = _trace(self.apply_fn, params, args, kwargs)
    return self._run(traced, traced.values, adapter, None, observe)[0]

  def _traced(
    self, params: PyTree, adapter: Adapter, args: Any, kwargs: Any
  ) -> "_Traced":
    """The function with the leaves that a checked adapter replaces."""
    leaves = arrays(params)
    for path in adapter:
      if path not in leaves:
        raise LoraxError(unknown("adapter path", path, leaves))
      adapter[path].check(path, leaves[path].shape)
    return _trace(self.apply_fn, _with_replaced(params, adapter), args, kwargs)

  def _evaluated(
    self,
    traced: "_Traced",
    values: Sequence[Any],
    adapter: Adapter,
    dropout_key: jax.Array | None,
  ) -> list[Any]:
    """The results of a traced function on these operands, with the deltas."""
    results, used = self._run(traced, values, adapter, dropout_key)
    lost = [p for p, d in adapter.items() if isinstance(d, Followed) and p not in used]
    if lost:
      raise LoraxError(
        f"the adapter's delta of {', '.join(map(repr, lost))} is never used by the"
        " function"
      )
    return results

  def _run(
    self,
    traced: "_Traced",
    values: Sequence[Any],
    adapter: Adapter,
    dropout_key: jax.Array | None,
    observe: Observe | None = None,
  ) -> tuple[list[Any], set[str]]:
    """The results, and the paths whose deltas were used."""
    run = Run(dropout_key, self.config.on_unsupported == "materialize", observe)
    operands, index = list(values), {path: i for i, path in enumerate(traced.leaves)}
    for i, path in enumerate(traced.leaves):
      delta = adapter.get(path)
      if isinstance(delta, Followed):
        at = index.get(beside(path, delta.bias_name))
        bias = None if at is None else values[at]
        operands[i] = _view(path, operands[i], delta, bias)
      elif is_quantized(operands[i]):
        operands[i] = View.frozen(Stored(operands[i]), path)
    jaxpr, consts = jx.open_jaxpr(traced.jaxpr)
    results = [
      run.materialize("output", x) if is_view(x) else x
      for x in run.jaxpr(jaxpr, consts, operands)
    ]
    return results, run.used


def adapt(apply_fn: Callable[..., Any], config: LoraConfig) -> Adapted:
  """Puts low-rank deltas beside the weights of a function.

  The function is traced to a jaxpr, the targeted weights are followed through it, and
  where one is consumed, x W becomes x W + scale (x a) b. Neither W + delta nor a dense
  gradient of W is ever formed. The result composes with jit, grad, vmap, remat, scan.

  Args:
    apply_fn: fn(params, *args, **kwargs), `params` any pytree: a Linen
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


def _takes(fn: Callable[..., Any], name: str) -> bool:
  """True of a function that takes a keyword of this name, or may."""
  try:
    parameters = inspect.signature(fn).parameters
  except (TypeError, ValueError):  # a callable that has no signature
    return True
  return any(
    p.kind is p.VAR_KEYWORD or (p.name == name and p.kind is not p.POSITIONAL_ONLY)
    for p in parameters.values()
  )


def _check_no_dropout(adapter: Adapter) -> None:
  dropped = [p for p, d in adapter.items() if isinstance(d, Followed) and d.dropout]
  if dropped:
    raise LoraxError(
      "apply: the function itself takes 'dropout_key', so whose it is can't be told;"
      f" LoRA's dropout, of {listing(dropped, 4)}, takes lora_dropout_key=KEY beside it"
    )


@dataclass(frozen=True)
class _Traced:
  jaxpr: Any
  leaves: dict[str, Any]  # path to leaf of params
  values: list[Any]  # operands of the jaxpr: the leaves, then the arrays among the args
  num_args: int
  out_tree: Any


def _cotangent(x: Any) -> Any:
  is_float = jnp.issubdtype(x.dtype, jnp.inexact)
  return jnp.ones_like(x) if is_float else np.zeros(x.shape, jax.dtypes.float0)


def _opened(tree: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
  """The tree's arrays, and a function of their replacements to such a tree.

  Other leaves (flags, names, numbers, functions) stay Python values.
  """
  leaves, structure = jax.tree.flatten(tree, is_leaf=is_quantized)

  def rebuilt(values: Sequence[Any]) -> PyTree:
    given = iter(values)
    new = [next(given) if is_array(x) else x for x in leaves]
    return jax.tree.unflatten(structure, new)

  return list(filter(is_array, leaves)), rebuilt


def _trace(fn, params, args, kwargs) -> _Traced:
  """Traces fn; only the arrays among params and arguments are traced.

  A quantised weight is an array to the function.
  """
  weights, with_weights = _opened(params)
  data, with_data = _opened((args, kwargs))

  def flat(weights, data):
    inner_args, inner_kwargs = with_data(data)
    return fn(with_weights(weights), *inner_args, **inner_kwargs)

  shown = [jx.struct(w) if is_quantized(w) else w for w in weights]
  jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(shown, data)
  return _Traced(
    jaxpr, arrays(params), [*weights, *data], len(data), jax.tree.structure(shapes)
  )


def _with_replaced(params: PyTree, adapter: Adapter) -> PyTree:
  """params with the leaves that are trained in full."""
  leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
  for i, (path, leaf) in enumerate(flatten(params).items()):
    delta = adapter.get(path)
    if delta is not None and not isinstance(delta, Followed):
      leaves[i] = delta.merged(dense(leaf))
  return jax.tree.unflatten(tree, leaves)


def _view(path: str, value: Any, delta: Followed, bias: Any) -> View:
  def parts_of(delta: Followed, value: Any) -> Parts:
    return delta.parts_beside(dense(value), bias)

  if is_quantized(value):
    # A method that reads W's values reads them again in the backward pass.
    parts: Parts = jax.checkpoint(parts_of)(delta, value)
    value = Stored(value)
  else:
    parts = parts_of(delta, value)
  for name, t in parts._asdict().items():
    if t is not None and any(
      n not in (1, size) for n, size in zip(t.shape, value.shape, strict=False)
    ):
      raise LoraxError(
        f"{type(delta).__name__}.parts gives {name!r} of shape {t.shape} for {path!r},"
        f" whose shape is {value.shape}"
      )
  dims = tuple(Dim(frozenset({(path, i)}), role) for i, role in enumerate(delta.roles))
  view = View(value, *parts, jnp.int32(0), path, dims, delta.dropout)
  return replace(view, choice=delta.choice)
