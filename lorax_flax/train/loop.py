"""The training loop: step, log, evaluate, save, and take up where it was."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lorax_flax.distributed import processes
from lorax_flax.files import bucket, workdir
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import program as programs
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.checkpoint import Checkpoints, Progress
from lorax_flax.train.config import Durations, TrainConfig, durations
from lorax_flax.train.drive import Drive, Work
from lorax_flax.train.evaluate import Batches
from lorax_flax.train.logs import curves
from lorax_flax.train.logs.history import Diverged, Ledger
from lorax_flax.train.logs.progress_bar import Display
from lorax_flax.train.logs.writer import Record, SilentRecord
from lorax_flax.train.losses import Loss

PyTree = Any


@dataclass(frozen=True)
class Job:
  """What is trained on what.

  Attributes:
    forward: the adapted model; see `lorax_flax.train.step.Forward`.
    params: the base, frozen; it lies on the mesh already.
    adapter: what is trained, as `lora.init` or a folder gave it.
    loss: of one example each.
    batches: an endless iterator over training batches, with `get_state()`, which is
      JSON-able, and `set_state()`.
    steps_per_epoch: batches an epoch.
    evaluation: batches by the split's name.
    metrics: keys of `metrics.METRICS`.
    primary: the one of them that says which evaluation is the best.
    export: writes an adapter into the workdir, and returns what to call the files:
      names to put into result.json, and where each thing lies. Every process calls it,
      with the adapter whole on its host; the first one writes.
    title: of the curves.
    mesh: the devices.
    axes: names of the axes of every leaf of `params`; see `lorax_flax.sharding.mesh`.
    eval_loss: of one example each in evaluations, where it is another than `loss`.
    predictions: what metrics look at of an evaluation's logits.
  """

  forward: steps.Forward
  params: PyTree
  adapter: Adapter
  loss: Loss
  batches: Any
  steps_per_epoch: int
  evaluation: Mapping[str, Batches]
  metrics: Sequence[str]
  primary: str
  export: Callable[[Adapter, Path], Mapping[str, str]]
  title: str
  mesh: Mesh
  axes: meshes.Axes
  eval_loss: Loss | None = None
  predictions: steps.Predictions = steps.logits


def fit(config: TrainConfig, job: Job, folder: Path) -> dict[str, Any]:
  """Trains to the end, going on from the last checkpoint in `folder`, if any.

  A run that was killed and goes on ends with the same weights, the same metrics and the
  same metrics.jsonl, bit for bit, as one that was not. It may go on with another mesh
  or number of processes, and is then the same to rounding.

  Args:
    folder: claimed by this run (`workdir.claim`).

  Returns:
    What it wrote to result.json: the metrics of the best evaluation by name (the
    adapter that is exported is that one's), those of the last one, and figures.

  Raises:
    Diverged: the loss or the gradient is not finite; the last checkpoint stays.
    processes.Preempted: SIGTERM asked for it; the run is saved.
  """
  plan = durations(config, job.steps_per_epoch)
  program = program_of(config, plan, job)
  state, base = program.start(job.params, job.adapter)
  progress = Progress(position=job.batches.get_state())
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(processes.StopRequest())
    checkpoints = Checkpoints(folder / workdir.CHECKPOINTS)
    stack.enter_context(closing(checkpoints))
    done = checkpoints.latest() or 0
    if done:
      state, progress = checkpoints.restore(done, state)
      job.batches.set_state(progress.position)
    record = stack.enter_context(recording(folder, done))
    display = stack.enter_context(displaying(plan.total, done))
    work = Work(
      step=program.step,
      eval_step=steps.eval_step(
        job.forward, job.eval_loss or job.loss, job.mesh, job.predictions
      ),
      base=base,
      batches=job.batches,
      evaluation=job.evaluation,
      metrics=job.metrics,
      mesh=job.mesh,
      lies=meshes.batch(job.mesh),
      apart=lambda tree: [tree],
      diverged=functools.partial(_end, checkpoints),
      evaluated=lambda state, improved: state,
      progress=lambda each: each[0],
    )
    ledger = Ledger(record, plan, job.primary, config.on_nonfinite, progress)
    drive = Drive(
      config, plan, work, [ledger], checkpoints, display, stop, progress.seconds
    )
    state = drive.train(state, done)
    checkpoints.wait()
    best, _ = ledger.best_and_last()
    if best["step"] != plan.total:
      state, _ = checkpoints.restore(best["step"], state)
    adapter = meshes.gather(base.adapter(state.trained))
    trained = states.trained_parameters(state)
    result = finish(job, ledger, adapter, trained, folder, drive.clock.seconds())
    processes.barrier("the result is written")
  return result


def program_of(config: TrainConfig, plan: Durations, job: Job) -> programs.Program:
  """The step that trains a job, and how what it takes lies."""
  return programs.make(
    config,
    plan,
    forward=job.forward,
    loss=job.loss,
    adapter=job.adapter,
    mesh=job.mesh,
    axes=job.axes,
  )


def finish(
  job: Job,
  ledger: Ledger,
  adapter: Adapter,
  trained_parameters: int,
  folder: Path,
  seconds: Mapping[str, float],
) -> dict[str, Any]:
  """Writes what a run that is over leaves in its folder; returns its result.

  Args:
    adapter: the best evaluation's, whole on this host.
    seconds: of the run, by what they were spent on.
  """
  with bucket.staging(folder) as here:
    paths = job.export(adapter, here)
  lie = {n: str(folder / Path(p).relative_to(here)) for n, p in paths.items()}
  result = ledger.result(trained_parameters, seconds) | lie
  if processes.first():
    curves.draw(folder / workdir.CURVES, ledger.record.lines, job.title)
    workdir.write_json(folder / workdir.RESULT, result)
  return result


def _end(checkpoints: Checkpoints, ledger: Ledger, error: Diverged) -> None:
  """Ends the run: says what is kept of it."""
  checkpoints.wait()
  kept = checkpoints.latest()
  raise Diverged(
    error.step,
    error.reason,
    f". The checkpoint of step {kept} is kept" if kept else ". Nothing was saved yet",
  ) from error


@contextlib.contextmanager
def recording(folder: Path, done: int) -> Iterator[Record | SilentRecord]:
  """A run's record, which the first process keeps; `done` steps were done before."""
  record = Record(folder, done) if processes.first() else SilentRecord()
  with closing(record):
    yield record


@contextlib.contextmanager
def displaying(total: int, done: int) -> Iterator[Display]:
  """What the first process shows; `done` of `total` steps were done before."""
  with Display(total, done, quiet=not processes.first()) as display:
    if done:
      display.say(f"going on after step {done} of {total}")
    yield display


@contextlib.contextmanager
def closing(thing: Checkpoints | Record | SilentRecord) -> Iterator[None]:
  """Closes it; after an error, that is the one that is raised."""
  try:
    yield
  except BaseException:
    # Of several processes this one alone may have failed: closing would wait for the
    # others, who wait for it. It will end at once.
    if jax.process_count() == 1:
      with contextlib.suppress(Exception):
        thing.close()
    raise
  thing.close()
