"""The state of N runs in one tree, and the steps that all of them take at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_flax.adapt.partition import leaf_mask, partition, trainable_mask
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import step as steps
from lorax_flax.train.config import Durations, TrainConfig
from lorax_flax.train.objective import Objective
from lorax_flax.train.state import Base, TrainState

PyTree = Any

# Number of trials that go through the model at once, by the padded size of one's batch
# in the task's unit of work (tokens).
Width = Callable[[int], int]
# Tokens on each chip up to which several trials at once are faster than one after
# another, by the roofline of v5e (benchmarks/sweep_roofline.py): their activations fit
# into the chip's cache.
ROOM = 256

# The fields of a TrainConfig that are numbers of the step, each trial's own.
NUMBERS = ("learning_rate", "weight_decay", "grad_clip")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class States:
  """The state of N trials: every leaf has a leading axis N.

  Attributes:
    each: the state of each trial.
    best: each trial's trained leaves at its best evaluation.
    alive: bool (N,), False from the step on that was not finite.
  """

  each: TrainState
  best: Adapter
  alive: jax.Array

  @property
  def trained(self) -> Adapter:
    return self.each.trained


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bases:
  """Everything that the steps of N trials only read.

  Attributes:
    base: what all trials share, once; `rest` without the leaves of `own`.
    own: untrained leaves that differ from trial to trial (the scale), (N, …).
    numbers: fields of a TrainConfig, (N,) each.
  """

  base: Base
  own: Adapter
  numbers: dict[str, jax.Array]

  def of(self, own: Adapter) -> Base:
    """The base of the trial whose own leaves these are."""

    def either(x, y):
      return y if x is None else x  # Both are None where it is trained.

    rest = jax.tree.map(either, own, self.base.rest, is_leaf=lambda x: x is None)
    return Base(self.base.params, rest)


def within(room: int) -> Width:
  """Width of as many trials as fit `room` tokens together, and at least one."""
  return lambda tokens: max(1, room // tokens)


def train_step(
  forward: steps.Forward,
  objective: Objective,
  config: TrainConfig,
  plan: Durations,
  width: Width,
) -> Any:
  """Makes (States, Bases, batch) -> (States, metrics), every leaf with an axis N.

  Args:
    config: of its fields, those that all trials have in common.
  """
  loss, accumulation = objective.loss, config.accumulation

  def one(bases, state, alive, own, numbers, batch):
    optimizer, rate = steps.optimizer_of(config, plan, numbers)
    step = steps.one_step(forward, loss, optimizer, rate, accumulation, "skip")
    new, metrics = step(state, bases.of(own), batch)
    new = steps.select(alive, new, state)
    if config.on_nonfinite == "stop":
      for mean in metrics.values():
        alive &= jnp.isfinite(mean.total)
    return new, alive, metrics

  def step(state: States, bases: Bases, batch: steps.Batch):
    new, alive, metrics = _each(
      lambda *own: one(bases, *own),
      (state.each, state.alive, bases.own, bases.numbers, batch),
      width(objective.work.padded(batch) // len(state.alive)),
    )
    return States(new, state.best, alive), metrics

  return step


def eval_step(forward: steps.Forward, objective: Objective, width: Width) -> Any:
  """Makes (trained, Bases, batch) -> (predictions, mean loss), with an axis N each.

  The batch has none: it is the same for all.
  """
  loss = objective.eval_loss or objective.loss
  evaluate = steps.one_eval_step(forward, loss, objective.predictions)

  def step(trained: Adapter, bases: Bases, batch: steps.Batch):
    def one(trained, own):
      return evaluate(trained, bases.of(own), batch)

    return _each(one, (trained, bases.own), width(objective.work.padded(batch)))

  return step


def _each(function: Any, trees: tuple[PyTree, ...], width: int) -> PyTree:
  """The function over the trials' axis of the trees, `width` of them at once."""
  if width >= len(jax.tree.leaves(trees)[0]):
    return jax.vmap(function)(*trees)
  return jax.lax.map(lambda parts: function(*parts), trees, batch_size=width)


def abstract(
  state: TrainState, base: Base, batch: Mapping[str, Any], n: int
) -> tuple[States, Bases, dict[str, Any]]:
  """ShapeDtypeStructs that N trials' step takes, from those of one's step."""

  def stack(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        (n, *x.shape), x.dtype, sharding=sharding(x.sharding)
      ),
      tree,
    )

  replicated = meshes.replicated(jax.tree.leaves(base)[0].sharding.mesh)
  own, shared = own_and_shared(base.rest)
  number: Any = jax.ShapeDtypeStruct((n,), jnp.float32, sharding=replicated)
  alive = jax.ShapeDtypeStruct((n,), jnp.bool_, sharding=replicated)
  each = stack(state)
  return (
    States(each, each.trained, alive),  # type: ignore[arg-type]
    Bases(Base(base.params, shared), stack(own), dict.fromkeys(NUMBERS, number)),
    stack(dict(batch)),
  )


def own_and_shared(rest: Adapter) -> tuple[Adapter, Adapter]:
  """Untrained leaves as (those of the trial, those of the base)."""
  return partition(rest, leaf_mask(rest, lambda delta: delta.per_trial))


def largest_ranks(adapters: Sequence[Adapter]) -> dict[str, int]:
  """The largest rank that a trial gives each delta that has one."""
  ranks = {p: max(each[p].rank for each in adapters) for p in adapters[0]}
  return {path: rank for path, rank in ranks.items() if rank}


def padded(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
  """The deltas with these ranks, zero beyond their own."""
  return {p: d.padded(ranks[p]) if p in ranks else d for p, d in adapter.items()}


def trimmed(trained: Adapter, like: Adapter) -> Adapter:
  """The factors of `trained` without their padding, as long as `like`'s."""
  return jax.tree.map(
    lambda mark, x, own: x[tuple(map(slice, own.shape))] if mark else None,
    trainable_mask(like),
    trained,
    like,
  )


def one(tree: PyTree, i: int) -> PyTree:
  """The leaves of trial i."""
  return jax.tree.map(lambda x: x[i], tree)


def sharding(of: NamedSharding) -> NamedSharding:
  """The sharding with a leading axis over the trials, which is replicated."""
  mesh = of.mesh
  assert isinstance(mesh, Mesh)
  return NamedSharding(mesh, PartitionSpec(None, *of.spec))
