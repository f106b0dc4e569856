"""A run, and several runs on one base in one program: trials that step together.

What differs from trial to trial is data: factors, optimiser state, scale (alpha), the
learning rate and its kin, dropout's key, the batch. The base is there once. Ranks that
differ are padded with zeros to the largest: a pair of zero factors has zero gradients,
so the padding stays zero and the trial is what it is alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_flax.adapt.partition import leaf_mask, partition, trainable_mask, without
from lorax_flax.data.pipeline import LENGTH, Cut
from lorax_flax.errors import LoraxError
from lorax_flax.methods import Adapter
from lorax_flax.nodes import node
from lorax_flax.sharding import activations
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.config import Durations, TrainConfig
from lorax_flax.train.logs.page import About
from lorax_flax.train.objective import Objective
from lorax_flax.train.optimizers import OPTIMIZERS
from lorax_flax.train.state import Base, TrainState

PyTree = Any

# Number of trials that go through the model at once, by the padded size of one's batch
# in the task's unit of throughput (tokens).
Width = Callable[[int], int]
# Tokens on each chip up to which several trials at once are faster than one after
# another, by the roofline of v5e (benchmarks/sweep_roofline.py): their activations fit
# into the chip's cache.
ROOM = 256

# The fields of a TrainConfig that are numbers of the step, each trial's own.
NUMBERS = ("learning_rate", "weight_decay", "grad_clip")
# The fields of a TrainConfig in which trials that train together may differ.
MAY_DIFFER = (*NUMBERS, "seed")


@dataclass(frozen=True)
class Run:
  """A run: everything that is its own where several train on one base.

  Attributes:
    config: how it trains; `MAY_DIFFER` names the fields that may be its own.
    adapter: the adapter before the first step; its trained leaves are given up once
      they are in the state (`started`). Leaves of the base that are not the same in all
      runs (a new head, drawn by the seed) are trained in full.
    folder: claimed by this run.
    export: (adapter, content of result.json so far, folder) -> paths of what it wrote
      there, by the names under which result.json has them. Every process calls it, with
      the adapter replicated on its host; the first one writes.
    about: what its report says of it besides the metrics.
    name: prefix of its log lines; empty where it trains alone.
  """

  config: TrainConfig
  adapter: Adapter
  folder: Path
  export: Callable[[Adapter, Mapping[str, Any], Path], Mapping[str, str]]
  about: About
  name: str = ""

  def started(self) -> None:
    """Gives up the memory of the adapter's trained leaves."""
    self.adapter.update(without(self.adapter, lambda delta: delta.trained))


@node
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


@node
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


@dataclass(frozen=True)
class Program:
  """The steps of runs in N places, with the interface of `train.step.Program`.

  Every leaf of the state, of a training batch and of what a step returns has a leading
  axis N. An evaluation batch has none, and is the same for all.

  Attributes:
    seat: (state, bases, place, run) -> (state, bases) with that run, before its first
      step, in the place of another. Nothing is compiled again, and both are donated.
    vacate: (state, place) -> the state after which that place takes no steps.
  """

  step: Any
  eval_step: Any
  batch: NamedSharding
  start: Callable[[], tuple[States, Bases]]
  seat: Callable[[States, Bases, int, Run], tuple[States, Bases]]
  vacate: Callable[[States, int], States]
  places: int

  def unstack(self, tree: PyTree) -> list[PyTree]:
    """The part of each place in a tree that a step takes or returns."""
    return [_one(tree, i) for i in range(self.places)]

  def full(self, state: States, bases: Bases, place: int) -> tuple[PyTree, Adapter]:
    """Params and adapter of a place, as `lora.apply` takes them, its ranks padded."""
    base = bases.of(_one(bases.own, place))
    return base.full(_one(state.trained, place))

  def evaluated(self, state: States, due: Sequence[bool]) -> tuple[Adapter, np.ndarray]:
    """The first argument of `eval_step`, which skips the places that are not due."""
    return state.trained, np.array(due)

  def keep_best(self, state: States, improved: Sequence[bool]) -> States:
    """The state after an evaluation, with the best of each place so far."""
    best = _chosen(state.best, state.trained, np.array(improved))
    return dataclasses.replace(state, best=best)

  def best(
    self, last: States, place: int, run: Run, restored: Callable[[], States]
  ) -> Adapter:
    """The trained leaves of a run's best evaluation, from the last state."""
    del restored
    best = jax.device_get(meshes.gather(last.best))
    return _trimmed(_one(best, place), run.adapter)


def program(
  runs: Sequence[Run],
  seated: Sequence[int],
  plan: Durations,
  model: steps.Model,
  objective: Objective,
  width: int | None,
  cut: Cut,
) -> Program:
  """The program of several runs.

  Args:
    seated: number of the run in each place at the start.
    width: as in `lorax_flax.train.loop.fit`.
    cut: of the training batches.

  Raises:
    LoraxError: two of the runs differ in more than they may.
  """
  _check(runs)
  adapters = [run.adapter for run in runs]
  ranks, mesh, config = _largest_ranks(adapters), model.mesh, runs[0].config
  at_once = _width(mesh) if width is None else lambda tokens: width
  placed = states.own(meshes.of_adapter(mesh, model.axes, adapters[0]))
  optimizer, _ = steps.optimizer_of(config, plan, adapters[0])
  replicated = meshes.replicated(mesh)

  def create(adapter: Adapter, seed: int) -> tuple[TrainState, Base]:
    return steps.create_state(model.params, adapter, optimizer, seed)

  first, _ = jax.eval_shape(lambda adapter: create(adapter, 0), adapters[0])
  alone = states.shardings(first, placed, mesh)
  rest = partition(placed, trainable_mask(placed))[1]
  # Of a run's state, and of what its steps read and no other's; then of those of all.
  single = (
    States(alone, alone.trained, replicated),  # type: ignore[arg-type]
    (own_and_shared(rest)[0], dict.fromkeys(NUMBERS, replicated)),
  )
  stacked = jax.tree.map(sharding, single)
  put = jax.jit(_put, donate_argnums=0, out_shardings=stacked)
  freeze = jax.jit(_freeze, out_shardings=sharding(replicated))

  def fresh(run: Run) -> tuple[PyTree, Adapter]:
    """A run before its first step, and the untrained leaves that all share."""
    padded = meshes.place(states.own(_padded(run.adapter, ranks)), placed)
    state, base = create(padded, run.config.seed)
    mine, shared = own_and_shared(base.rest)
    numbers = {n: np.float32(getattr(run.config, n)) for n in NUMBERS}
    own = States(state, state.trained, np.True_), (mine, numbers)  # type: ignore[arg-type]
    return meshes.place(own, single), shared

  def start() -> tuple[States, Bases]:
    each = [fresh(runs[i]) for i in seated]
    state, (mine, numbers) = meshes.place(_stack([own for own, _ in each]), stacked)
    params = steps.read_params(model, adapters[0])
    return state, Bases(Base(params, each[0][1]), mine, numbers)

  def seat(state: States, bases: Bases, place: int, run: Run) -> tuple[States, Bases]:
    there = state, (bases.own, bases.numbers)
    state, (mine, numbers) = put(there, fresh(run)[0], np.int32(place))
    return state, Bases(bases.base, mine, numbers)

  def vacate(state: States, place: int) -> States:
    return dataclasses.replace(state, alive=freeze(state.alive, np.int32(place)))

  return Program(
    steps.jitted(
      train_step(model.forward, objective, config, plan, at_once, cut), stacked[0]
    ),
    jax.jit(eval_step(model.forward, objective, at_once), out_shardings=replicated),
    sharding(meshes.batch(mesh)),
    start,
    seat,
    vacate,
    len(seated),
  )


def _put(stacked: PyTree, one: PyTree, place: jax.Array) -> PyTree:
  """The stacked trees with one more in the place of another."""
  update = jax.lax.dynamic_update_index_in_dim
  return jax.tree.map(lambda x, y: update(x, y, place, 0), stacked, one)


def _freeze(alive: jax.Array, place: jax.Array) -> jax.Array:
  return alive.at[place].set(False)


def _stack(trees: Sequence[PyTree]) -> PyTree:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def within(room: int) -> Width:
  """Width of as many trials as fit `room` tokens together, and at least one."""
  return lambda tokens: max(1, room // tokens)


def train_step(
  forward: steps.Forward,
  objective: Objective,
  config: TrainConfig,
  plan: Durations,
  width: Width,
  cut: Cut,
) -> Any:
  """Makes (States, Bases, batch) -> (States, metrics), every leaf with an axis N.

  Args:
    config: of its fields, those that all trials have in common.
    cut: of the batches. Trials one by one compute theirs as they do alone; several at
      once compute what is padded to the longest.
  """
  loss, accumulation = objective.loss, config.accumulation

  def one(bases, cut, state, alive, own, numbers, batch, length):
    optimizer, rate = steps.optimizer_of(config, plan, state.trained, numbers)
    step = steps.train_step(forward, loss, optimizer, rate, accumulation, "skip")
    step = _cut_to(length, cut, step)
    new, metrics = _where(
      alive, step, lambda none: (state, none[1]), state, bases.of(own), batch
    )
    if config.on_nonfinite == "stop":
      for mean in metrics.values():
        alive &= jnp.isfinite(mean.total)
    return new, alive, metrics

  def step(state: States, bases: Bases, batch: steps.Batch):
    batch, none = dict(batch), Cut((), ())
    length_N = batch.pop(LENGTH)[:, 0]
    at_once = width(objective.throughput.padded(batch) // len(state.alive))
    new, alive, metrics = _each(
      lambda *own: one(bases, cut if at_once == 1 else none, *own),
      (state.each, state.alive, bases.own, bases.numbers, batch, length_N),
      at_once,
    )
    return States(new, state.best, alive), metrics

  return step


def eval_step(forward: steps.Forward, objective: Objective, width: Width) -> Any:
  """Makes ((trained, due), Bases, batch) -> (predictions, mean loss), with an axis N.

  The batch has none: it is the same for all. What is not due is zero.
  """
  loss = objective.eval_loss or objective.loss
  evaluate = steps.eval_step(forward, loss, objective.predictions)

  def step(
    trained_and_due: tuple[Adapter, jax.Array], bases: Bases, batch: steps.Batch
  ):
    def one(trained, due, own):
      return _where(due, evaluate, lambda none: none, trained, bases.of(own), batch)

    return _each(
      one, (*trained_and_due, bases.own), width(objective.throughput.padded(batch))
    )

  return step


def _cut_to(length: jax.Array, cut: Cut, step: Any) -> Any:
  """The step, of the part of a batch up to a length.

  What is beyond it is padding, but costs time, and changes what dropout draws.
  """

  if not cut.columns:
    return step

  def own(state: TrainState, base: Base, batch: steps.Batch):
    full = batch[cut.columns[0]].shape[1]
    lengths = [n for n in cut.lengths if n <= full]

    def up_to(n: int, state: TrainState, base: Base, batch: steps.Batch):
      part = {name: batch[name][:, :n] for name in cut.columns}
      return step(state, base, {**batch, **part})

    number = jnp.searchsorted(jnp.array(lengths), length)
    branches = [functools.partial(up_to, n) for n in lengths]
    return jax.lax.switch(number, branches, state, base, batch)

  return own


def _where(flag: jax.Array, function: Any, otherwise: Any, *args: Any) -> Any:
  """The function's result where the flag is set, else `otherwise(zeros like it)`.

  Trials one by one do not compute what is not asked for.
  """
  traced = jax.jit(function)  # Once, for its shapes and its branch.
  none = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(traced, *args)
  )
  return jax.lax.cond(flag, traced, lambda *_: otherwise(none), *args)


def _each(function: Any, trees: tuple[PyTree, ...], width: int) -> PyTree:
  """The function over the trials' axis of the trees, `width` of them at once."""
  if width >= len(jax.tree.leaves(trees)[0]):
    return jax.vmap(function)(*trees)
  if width == 1:  # A batch of one would compute both branches of `_where`.
    return jax.lax.map(lambda one: function(*one), trees)
  return jax.lax.map(lambda parts: function(*parts), trees, batch_size=width)


def own_and_shared(rest: Adapter) -> tuple[Adapter, Adapter]:
  """Untrained leaves as (those of the trial, those of the base)."""
  return partition(rest, leaf_mask(rest, lambda delta: delta.per_trial))


def _largest_ranks(adapters: Sequence[Adapter]) -> dict[str, int]:
  """The largest rank that a trial gives each delta that has one."""
  ranks = {p: max(each[p].rank for each in adapters) for p in adapters[0]}
  return {path: rank for path, rank in ranks.items() if rank}


def _ranks(adapter: Adapter) -> dict[str, int]:
  return {path: delta.rank for path, delta in adapter.items()}


def _padded(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
  """The deltas with these ranks, zero beyond their own."""
  return {p: d.padded(ranks[p]) if p in ranks else d for p, d in adapter.items()}


def _trimmed(trained: Adapter, like: Adapter) -> Adapter:
  """The factors of `trained` without their padding, as long as `like`'s."""
  return jax.tree.map(
    lambda mark, x, own: x[tuple(map(slice, own.shape))] if mark else None,
    trainable_mask(like),
    trained,
    like,
  )


def _one(tree: PyTree, i: int) -> PyTree:
  """The leaves of trial i."""
  return jax.tree.map(lambda x: x[i], tree)


def sharding(of: NamedSharding) -> NamedSharding:
  """The sharding with a leading axis over the trials, which is replicated."""
  mesh = of.mesh
  assert isinstance(mesh, Mesh)
  return NamedSharding(mesh, PartitionSpec(None, *of.spec))


def _check(runs: Sequence[Run]) -> None:
  """Raises LoraxError unless one program can train them."""
  first = runs[0]
  for run in runs[1:]:
    same = {name: getattr(first.config, name) for name in MAY_DIFFER}
    if dataclasses.replace(run.config, **same) != first.config:
      raise LoraxError(
        f"{run.name} and {first.name} can't train together: of train's fields only "
        f"{', '.join(MAY_DIFFER)} may differ"
      )
    if run.adapter.keys() != first.adapter.keys():
      raise LoraxError(
        f"{run.name} and {first.name} can't train together: they train other weights"
      )
    by_element = OPTIMIZERS[first.config.optimizer].by_element
    if not by_element and _ranks(run.adapter) != _ranks(first.adapter):
      raise LoraxError(
        f"{run.name} and {first.name} can't train together: their ranks differ, and a "
        f"step of {first.config.optimizer} depends on a factor's padding"
      )


def _width(mesh: Mesh) -> Width:
  if jax.default_backend() == "cpu":
    return within(0)
  axes = (*activations.ROWS, activations.TOKENS)
  return within(ROOM * activations.num_shards(mesh.shape, axes))


@jax.jit
def _chosen(best: Adapter, trained: Adapter, improved: jax.Array) -> Adapter:
  def choose(old, new):
    return jnp.where(improved.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  return jax.tree.map(choose, best, trained)
