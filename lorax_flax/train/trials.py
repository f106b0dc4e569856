"""A run, and several runs on one base in one program: trials that step together.

What differs from trial to trial is data: factors, optimiser state, scale (alpha), the
learning rate and its kin, dropout's key, the batch. The base is there once. Ranks that
differ are padded with zeros to the largest: a pair of zero factors has zero gradients,
so the padding stays zero and the trial is what it is alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lorax_flax.errors import LoraxError
from lorax_flax.methods import Adapter
from lorax_flax.sharding import activations as spread
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import stacked
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.config import Durations, TrainConfig
from lorax_flax.train.objective import Objective
from lorax_flax.train.stacked import Bases, States
from lorax_flax.train.state import Base, TrainState

PyTree = Any

# The fields of a TrainConfig in which trials that train together may differ.
MAY_DIFFER = (*stacked.NUMBERS, "seed")


@dataclass(frozen=True)
class Run:
  """A run: everything that is its own where several train on one base.

  Attributes:
    config: how it trains; `MAY_DIFFER` names the fields that may be its own.
    adapter: the adapter before the first step. Leaves of the base
      that are not the same in all runs (a new head, drawn by the seed) are trained in
      full.
    folder: claimed by this run.
    export: writes an adapter into a folder, and returns paths by the names under which
      result.json has them. Every process calls it, with the adapter replicated on its
      host; the first one writes.
    title: heading of the curves.
    name: prefix of its log lines; empty where it trains alone.
  """

  config: TrainConfig
  adapter: Adapter
  folder: Path
  export: Callable[[Adapter, Path], Mapping[str, str]]
  title: str = ""
  name: str = ""


@dataclass(frozen=True)
class Program:
  """The steps of N runs, and what they take; see `lorax_flax.train.step.Program`.

  Attributes:
    step: (state, base, batch) -> (state, metrics), each leaf with a leading axis N.
    eval_step: (trained, base, batch) -> (predictions, mean loss); the batch has no
      such axis, and is the same for all.
    batch: sharding of a training batch.
    start: () -> (state before the first step, base).
    adapters: of the runs; their shapes are those of what is trained.
  """

  step: Any
  eval_step: Any
  batch: NamedSharding
  start: Callable[[], tuple[States, Bases]]
  adapters: Sequence[Adapter]

  def unstack(self, tree: PyTree) -> list[PyTree]:
    """The part of each run in a tree that a step takes or returns."""
    return [stacked.one(tree, i) for i in range(len(self.adapters))]

  def keep_best(self, state: States, improved: Sequence[bool]) -> States:
    """The state after an evaluation, with the best of each run so far."""
    best = _chosen(state.best, state.trained, np.array(improved))
    return dataclasses.replace(state, best=best)

  def best(self, last: States, restored: Callable[[], States]) -> list[Adapter]:
    """The trained leaves of each run's best evaluation, from the last state."""
    del restored
    best = meshes.gather(last.best)
    return [
      stacked.trimmed(stacked.one(best, i), like)
      for i, like in enumerate(self.adapters)
    ]


def program(
  runs: Sequence[Run],
  plan: Durations,
  model: steps.Model,
  objective: Objective,
  width: int | None,
) -> Program:
  """The program of several runs.

  Args:
    width: as in `lorax_flax.train.loop.fit`.

  Raises:
    LoraxError: two of the runs differ in more than they may.
  """
  _check(runs)
  adapters = [run.adapter for run in runs]
  ranks, mesh, config = stacked.largest_ranks(adapters), model.mesh, runs[0].config
  at_once = _width(mesh) if width is None else lambda tokens: width
  placed = meshes.of_adapter(mesh, model.axes, adapters[0])
  optimizer, _ = steps.optimizer_of(config, plan)
  replicated = meshes.replicated(mesh)

  def create(params: PyTree, adapter: Adapter, seed: int) -> tuple[TrainState, Base]:
    return steps.create_state(params, adapter, optimizer, seed)

  first, _ = jax.eval_shape(lambda adapter: create(None, adapter, 0), adapters[0])
  own = states.shardings(first, optimizer, placed, mesh)
  own = jax.tree.map(stacked.sharding, own)

  def start_one(run: Run) -> tuple[TrainState, Base]:
    adapter = meshes.place(stacked.padded(run.adapter, ranks), placed)
    return create(model.params, adapter, run.config.seed)

  shardings = States(own, own.trained, replicated)  # type: ignore[arg-type]

  def start() -> tuple[States, Bases]:
    pairs = [start_one(run) for run in runs]
    state = _stack([state for state, _ in pairs])
    rests = [stacked.own_and_shared(base.rest) for _, base in pairs]
    numbers = {
      name: jnp.array([getattr(run.config, name) for run in runs], jnp.float32)
      for name in stacked.NUMBERS
    }
    best = jax.tree.map(jnp.copy, state.trained)
    return (
      meshes.place(States(state, best, jnp.ones(len(runs), bool)), shardings),
      Bases(Base(model.params, rests[0][1]), _stack([x for x, _ in rests]), numbers),
    )

  return Program(
    steps.jitted(
      stacked.train_step(model.forward, objective, config, plan, at_once), shardings
    ),
    jax.jit(
      stacked.eval_step(model.forward, objective, at_once), out_shardings=replicated
    ),
    stacked.sharding(meshes.batch(mesh)),
    start,
    adapters,
  )


def _stack(trees: Sequence[PyTree]) -> PyTree:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


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


def _width(mesh: Mesh) -> stacked.Width:
  if jax.default_backend() == "cpu":
    return stacked.within(0)
  return stacked.within(stacked.ROOM * spread.num_shards(mesh.shape))


@jax.jit
def _chosen(best: Adapter, trained: Adapter, improved: jax.Array) -> Adapter:
  def choose(old, new):
    return jnp.where(improved.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  return jax.tree.map(choose, best, trained)
