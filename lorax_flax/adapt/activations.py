"""Starts that look at activations: adapters whose first factors are of the inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt import measured
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import PyTree, arrays, map_with_path
from lorax_flax.adapt.plan import Plan, Target, start
from lorax_flax.adapt.ranks import of_layers
from lorax_flax.adapt.transform import Adapted
from lorax_flax.errors import LoraxError, listing
from lorax_flax.methods import METHODS, Adapter, eva, probe
from lorax_flax.methods.moments import Moments

# The arguments of a call after params -> the weights of its rows, (B, T) or (B,); of a
# function whose inputs are of several such shapes, one array for each.
Weights = Callable[..., jax.Array | Sequence[jax.Array]]


def input_moments(
  lora: Adapted,
  params: PyTree,
  batches: Iterable[Sequence[Any]],
  targets: Sequence[Target],
  weights: Weights | None = None,
) -> dict[str, Moments]:
  """The moments of some targets' inputs over a few batches, by path.

  A target of n inputs takes some 3 n² numbers for each layer.

  Args:
    batches: arguments of the function after params, arrays.
    targets: of one method.
    weights: of the rows; None: all count as one.

  Raises:
    LoraxError: no batch; a target whose inputs are not met, or not finite.
  """
  weigh = METHODS.of_targets(targets[0].method, targets[0].options).weigh

  @jax.jit
  def of_batch(leaves, batch):
    base = map_with_path(lambda path, x: leaves.get(path, x), params)
    rows = () if weights is None else jax.tree.leaves(weights(*batch))
    observe = probe.observer(weigh, rows)

    def run(probes):
      adapter: Adapter = {t.path: probe.delta(t, probes[t.path]) for t in targets}
      return lora.observed(base, adapter, observe, *batch)

    results, pull = jax.vjp(run, {t.path: probe.zeros(t) for t in targets})
    (gradients,) = pull([_no_cotangent(x) for x in results])
    return {t.path: probe.of_gradient(t, gradients[t.path]) for t in targets}

  leaves, total = arrays(params), None
  for batch in batches:
    found = of_batch(leaves, tuple(batch))
    total = found if total is None else jax.tree.map(jnp.add, total, found)
  if total is None:
    raise LoraxError("input_moments: there is no batch")
  for problem, holds in (
    ("are not finite", lambda m: jnp.isfinite(m.second)),
    ("are not met by the function, or have no rows of weight", lambda m: m.total > 0),
    ("are all zero", lambda m: m.second.any((-2, -1))),
  ):
    if wrong := [path for path, m in total.items() if not holds(m).all()]:
      raise LoraxError(f"the inputs of {listing(wrong, 4)} {problem}")
  return total


def init_from_activations(
  lora: Adapted,
  key: jax.Array,
  params: PyTree,
  batches: Iterable[Sequence[Any]],
  /,
  *,
  weights: Weights | None = None,
) -> Adapter:
  """An adapter that changes nothing yet, started with its targets' inputs.

  Args:
    lora: its method is "corda", or its init "eva", which also gives each layer a rank
      of its own, and those of rank 0 no delta.
    key: as for `lora.init`.
    batches, weights: as for `input_moments`. Padding should have no weight.

  Raises:
    LoraxError: a start that looks at no inputs; what `input_moments` raises.
  """
  given = iter(batches)
  if (first := next(given, None)) is None:
    raise LoraxError("init_from_activations: there is no batch")
  plan = lora.plan(params, *first)
  targets = [t for t in plan.targets if t.starts_from == "inputs"]
  if not targets:
    raise LoraxError(
      f"method={lora.config.method!r} with init={lora.config.init!r} looks at no inputs"
      ", and lora.init starts it; init='eva' and method='corda' look at them"
    )
  found = input_moments(lora, params, chain([first], given), targets, weights)
  options = lora.config.init_options
  seen = {t.path: measured.of_inputs(t, found[t.path], options) for t in targets}
  if lora.config.init == "eva":
    plan, seen = _redistributed(plan, seen, lora.config)
  return start(plan, key, arrays(params), seen)


def _redistributed(
  plan: Plan, seen: Mapping[str, eva.Directions], config: LoraConfig
) -> tuple[Plan, dict[str, eva.Directions]]:
  """The plan whose ranks go to the largest shares of variance, and its directions."""
  options = {**eva.OPTIONS, **config.init_options}
  targets = [t for t in plan.targets if t.path in seen]
  shares, ranks = [], []
  for t in targets:
    own = np.asarray(seen[t.path].shares)
    if own.ndim > 2:
      raise LoraxError(f"eva: {t.path!r} has several stack axes: give it rho=1")
    for rank, share in zip(_ranks(t), np.atleast_2d(own), strict=True):
      most = eva.most(rank, options["rho"])
      if most > len(share):
        raise LoraxError(
          f"eva: rho={options['rho']:g} allows {t.path!r} the rank {most}, and it has"
          f" {len(share)} inputs: choose {len(share) / rank:g} or less"
        )
      shares.append(share[:most])
      ranks.append(rank)
  given = iter(eva.redistributed(shares, sum(ranks)))
  new = {t.path: _of_ranks(t, given, options["adjust_scale"], config) for t in targets}
  every = [new.get(t.path, t) for t in plan.targets]
  kept = {
    t.path: _in_layers(t, now, seen[t.path])
    for t in targets
    if (now := new[t.path]) is not None
  }
  return replace(plan, targets=tuple(t for t in every if t is not None)), kept


def _ranks(t: Target) -> tuple[int, ...]:
  """The rank of each adapted layer."""
  if t.ranks is not None:
    return t.ranks
  return (t.rank,) * (len(_layers(t)) if "stack" in t.roles else 1)


def _layers(t: Target) -> Sequence[int]:
  length = t.shape[t.roles.index("stack")]
  return range(length) if t.layers is None else t.layers


def _of_ranks(
  t: Target, given: Iterator[int], adjust: bool, config: LoraConfig
) -> Target | None:
  """The target with the next ranks; None where all are 0."""
  old = _ranks(t)
  new = [next(given) for _ in old]
  alphas = t.alpha if isinstance(t.alpha, tuple) else (t.alpha,) * len(old)
  if adjust:
    alphas = tuple(a * n / o for a, n, o in zip(alphas, new, old, strict=True))
  if not any(new):
    return None
  layers = _layers(t) if "stack" in t.roles else range(1)
  length = t.shape[t.roles.index("stack")] if "stack" in t.roles else 1
  return replace(t, **of_layers(config, new, alphas, layers, length)._asdict())


def _in_layers(old: Target, new: Target, seen: eva.Directions) -> eva.Directions:
  """The directions of the layers that still have a delta."""
  if new.layers == old.layers:
    return seen
  places = jnp.asarray([i for i, n in enumerate(_layers(old)) if n in _layers(new)])
  return jax.tree.map(lambda x: x[places], seen)


def _no_cotangent(x: jax.Array) -> Any:
  if jnp.issubdtype(x.dtype, jnp.inexact):
    return jnp.zeros_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)
