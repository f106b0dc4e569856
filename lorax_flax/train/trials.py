"""Several runs on one base in one program: a sweep's trials take each step together.

What differs from trial to trial is data: factors, optimiser state, scale (alpha), the
learning rate and its kin, dropout's key, the batch. The base is there once. Ranks that
differ are padded with zeros to the largest: a pair of zero factors has zero gradients,
so the padding stays zero and the trial is what it is alone.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lorax_flax.adapt.partition import combine, partition, trainable_mask
from lorax_flax.distributed import processes
from lorax_flax.errors import LoraxError
from lorax_flax.files import workdir
from lorax_flax.methods import Adapter
from lorax_flax.sharding import activations as spread
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import program as programs
from lorax_flax.train import stacked
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.checkpoint import Checkpoints, Progress, ProgressOfSeveral
from lorax_flax.train.config import Durations, TrainConfig, durations
from lorax_flax.train.drive import Drive, Work
from lorax_flax.train.logs.history import Diverged, Ledger
from lorax_flax.train.loop import Job, closing, displaying, finish, recording
from lorax_flax.train.stacked import Bases, States
from lorax_flax.train.state import Base, TrainState

PyTree = Any

# The fields of a TrainConfig in which trials that train together may differ.
MAY_DIFFER = (*stacked.NUMBERS, "seed")


@dataclass(frozen=True)
class Trial:
  """One of the runs.

  Attributes:
    name: in what is said of it.
    config: how it trains; `MAY_DIFFER` names what may be its own.
    job: what it trains. All jobs share the base's arrays; leaves of it that are not the
      same in all (a new head, drawn by the seed) are trained in full. `batches` is not
      used.
    folder: claimed by this run.
  """

  name: str
  config: TrainConfig
  job: Job
  folder: Path


def fit(
  trials: Sequence[Trial], batches: Any, folder: Path, width: int | None = None
) -> list[dict[str, Any] | Diverged]:
  """Trains them to the end, going on from the last checkpoint in `folder`, if any.

  Args:
    batches: an iterator as in `Job`, whose arrays have a leading axis N, a batch for
      each trial.
    folder: of what they have in common, the checkpoints.
    width: how many go through the model at once, the others after them in the same
      program; None: as many as the devices' caches have room for, on a CPU one.

  Returns:
    For each what `loop.fit` returns, or raises where it diverges. Its folder holds what
    it would hold alone, but for checkpoints.

  Raises:
    LoraxError: two of them differ in more than they may.
    processes.Preempted: SIGTERM asked for it; all is saved.
  """
  first, config = trials[0].job, trials[0].config
  _check(trials)
  plan = durations(config, first.steps_per_epoch)
  program = make(trials, plan, width)
  state, base = program.state, program.base
  start = [Progress(position=batches.get_state()) for _ in trials]
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(processes.StopRequest())
    checkpoints = Checkpoints(folder / workdir.CHECKPOINTS, ProgressOfSeveral.from_json)
    stack.enter_context(closing(checkpoints))
    progress, done = ProgressOfSeveral(start), checkpoints.latest() or 0
    if done:
      state, progress = checkpoints.restore(done, state)
      batches.set_state(progress.runs[0].position)
    display = stack.enter_context(displaying(plan.total, done))
    ledgers = [
      Ledger(
        stack.enter_context(recording(trial.folder, done)),
        plan,
        trial.job.primary,
        trial.config.on_nonfinite,
        own,
        trial.name,
      )
      for trial, own in zip(trials, progress.runs, strict=True)
    ]

    def diverged(ledger: Ledger, error: Diverged) -> None:
      ledger.failed = {"step": error.step, "reason": error.reason}
      display.say(f"{ledger.name}  {error.reason}: it ends here, the others go on")

    work = Work(
      step=program.step,
      eval_step=program.eval_step,
      base=base,
      batches=batches,
      evaluation=first.evaluation,
      metrics=first.metrics,
      mesh=first.mesh,
      lies=stacked.sharding(meshes.batch(first.mesh)),
      apart=lambda tree: [stacked.one(tree, i) for i in range(len(trials))],
      diverged=diverged,
      evaluated=_keep,
      progress=ProgressOfSeveral,
    )
    seconds = progress.runs[0].seconds
    drive = Drive(config, plan, work, ledgers, checkpoints, display, stop, seconds)
    if any(ledger.failed is None for ledger in ledgers):
      state = drive.train(state, done)
    checkpoints.wait()
    best = meshes.gather(state.best)
    results: list[dict[str, Any] | Diverged] = []
    for i, (trial, ledger) in enumerate(zip(trials, ledgers, strict=True)):
      if ledger.failed is not None:
        results.append(Diverged(ledger.failed["step"], ledger.failed["reason"]))
        continue
      adapter = stacked.trimmed(stacked.one(best, i), trial.job.adapter)
      trained = sum(x.size for x in jax.tree.leaves(adapter))
      rest = partition(trial.job.adapter, trainable_mask(trial.job.adapter))[1]
      results.append(
        finish(
          trial.job,
          ledger,
          combine(adapter, rest),
          trained,
          trial.folder,
          drive.clock.seconds(),
        )
      )
    processes.barrier("the results are written")
  return results


def _check(trials: Sequence[Trial]) -> None:
  """Raises LoraxError unless one program can train them."""
  first = trials[0]
  for trial in trials[1:]:
    same = {name: getattr(first.config, name) for name in MAY_DIFFER}
    if dataclasses.replace(trial.config, **same) != first.config:
      raise LoraxError(
        f"{trial.name} and {first.name} can't train together: of train's fields only "
        f"{', '.join(MAY_DIFFER)} may differ"
      )
    if trial.job.adapter.keys() != first.job.adapter.keys():
      raise LoraxError(
        f"{trial.name} and {first.name} can't train together: they train other weights"
      )


@dataclass(frozen=True)
class Program:
  """The steps of all trials, jitted, and what they start from.

  Attributes:
    step: (state, base, batch) -> (state, metrics), each leaf with a leading axis N.
    eval_step: (trained, base, batch) -> (predictions, mean loss); the batch has none.
    state, base: before the first step.
  """

  step: Any
  eval_step: Any
  state: States
  base: Bases


def make(trials: Sequence[Trial], plan: Durations, width: int | None) -> Program:
  """Makes the steps; the arguments are those of `fit`."""
  ranks = stacked.largest_ranks([trial.job.adapter for trial in trials])
  job, config = trials[0].job, trials[0].config
  n = len(trials)
  at_once = _width(job.mesh) if width is None else lambda tokens: width
  step = stacked.train_step(job.forward, job.loss, config, plan, at_once)
  eval_step = stacked.eval_step(
    job.forward, job.eval_loss or job.loss, job.predictions, at_once
  )
  numbers = {
    name: jnp.array([getattr(t.config, name) for t in trials], jnp.float32)
    for name in stacked.NUMBERS
  }
  optimizer, _ = programs.optimizer_of(config, plan)
  lies = meshes.of_adapter(job.mesh, job.axes, job.adapter)

  def start(trial: Trial) -> tuple[TrainState, Base]:
    adapter = meshes.place(stacked.padded(trial.job.adapter, ranks), lies)
    return programs.create(trial.job.params, adapter, optimizer, trial.config.seed)

  pairs = [start(trial) for trial in trials]
  shardings = states.shardings(pairs[0][0], optimizer, lies, job.mesh)
  shardings = jax.tree.map(stacked.sharding, shardings)
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s for s, _ in pairs))
  rests = [stacked.own_and_shared(base.rest) for _, base in pairs]
  own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(own for own, _ in rests))
  whole = meshes.replicated(job.mesh)
  lying = States(shardings, shardings.trained, whole)  # type: ignore[arg-type]
  best = jax.tree.map(jnp.copy, state.trained)
  return Program(
    steps.jitted(step, lying),
    jax.jit(eval_step, out_shardings=whole),
    meshes.place(States(state, best, jnp.ones(n, bool)), lying),
    Bases(Base(job.params, rests[0][1]), own, numbers),
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


def _keep(state: States, improved: Sequence[bool]) -> States:
  """Keeps what has been the best so far."""
  best = _chosen(state.best, state.trained, np.array(improved))
  return dataclasses.replace(state, best=best)
