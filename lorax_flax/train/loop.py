"""The training loop: step, log, evaluate, save, and take up where it was."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lorax_flax.errors import LoraxError
from lorax_flax.methods import Adapter
from lorax_flax.train import bucket, curves, processes, workdir
from lorax_flax.train import mesh as meshes
from lorax_flax.train import program as programs
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.checkpoint import Checkpoints, Progress
from lorax_flax.train.compiled import Compiled
from lorax_flax.train.config import Durations, TrainConfig, durations
from lorax_flax.train.display import Display
from lorax_flax.train.evaluate import Batches, evaluate
from lorax_flax.train.losses import Loss
from lorax_flax.train.metrics import METRICS, Mean
from lorax_flax.train.record import Record, SilentRecord
from lorax_flax.train.state import Base, TrainState
from lorax_flax.train.stopwatch import Stopwatch

PyTree = Any

# Steps in a row that may be skipped, where a run does not stop at the first.
_MOST_SKIPPED = 50


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
    axes: names of the axes of every leaf of `params`; see `lorax_flax.train.mesh`.
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
    LoraxError: the loss or the gradient is not finite; the last checkpoint stays.
    processes.Preempted: SIGTERM asked for it; the run is saved.
  """
  plan = durations(config, job.steps_per_epoch)
  program = programs.make(
    config,
    plan,
    forward=job.forward,
    loss=job.loss,
    adapter=job.adapter,
    mesh=job.mesh,
    axes=job.axes,
  )
  state, base = program.start(job.params, job.adapter)
  progress = Progress(position=job.batches.get_state())
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(processes.StopRequest())
    checkpoints = Checkpoints(folder / workdir.CHECKPOINTS)
    stack.enter_context(_closing(checkpoints))
    done = checkpoints.latest() or 0
    if done:
      state, progress = checkpoints.restore(done, state)
      job.batches.set_state(progress.position)
    record = Record(folder, done) if processes.first() else SilentRecord()
    stack.enter_context(_closing(record))
    display = stack.enter_context(
      Display(plan.total, done, quiet=not processes.first())
    )
    if done:
      display.say(f"going on after step {done} of {plan.total}")
    run = _Run(config, job, plan, base, checkpoints, record, display, progress, stop)
    state = run.train(program.step, state, done)
    checkpoints.wait()
    best, last = run.best_and_last()
    if best["step"] != plan.total:
      state, _ = checkpoints.restore(best["step"], state)
    adapter = meshes.gather(base.adapter(state.trained))
    with bucket.staging(folder) as here:
      paths = job.export(adapter, here)
    lie = {n: str(folder / Path(p).relative_to(here)) for n, p in paths.items()}
    result = _result(job, plan, run, state, best, last) | lie
    if processes.first():
      curves.draw(folder / workdir.CURVES, record.lines, job.title)
      workdir.write_json(folder / workdir.RESULT, result)
    processes.meet("the result is written")
  return result


@contextlib.contextmanager
def _closing(thing: Checkpoints | Record | SilentRecord) -> Iterator[None]:
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


def _result(
  job: Job,
  plan: Durations,
  run: "_Run",
  state: TrainState,
  best: Mapping[str, Any],
  last: Mapping[str, Any],
) -> dict[str, Any]:
  seconds = run.clock.seconds()
  return {
    **best["metrics"],
    "primary_metric": job.primary,
    "best_step": best["step"],
    "best_epoch": best["epoch"],
    "steps": plan.total,
    "epochs": plan.total / plan.epoch,
    "last": last["metrics"],
    "examples_evaluated": best["examples"],
    "trained_parameters": states.trained_parameters(state),
    "train_seconds": sum(seconds.values()),
    "seconds": seconds,
    "skipped_steps": run.skipped,
    "tokens": run.tokens,
    "tokens_per_second": run.tokens / seconds["steps"] if seconds["steps"] else 0.0,
  }


class _Run:
  """What the loop carries on the host from step to step."""

  def __init__(
    self,
    config: TrainConfig,
    job: Job,
    plan: Durations,
    base: Base,
    checkpoints: Checkpoints,
    record: Record | SilentRecord,
    display: Display,
    progress: Progress,
    stop: processes.StopRequest,
  ):
    self._stop = stop
    self._config, self._job, self._plan, self._base = config, job, plan, base
    self._checkpoints, self._record, self._display = checkpoints, record, display
    self._evaluations = list(progress.evaluations)
    self._best = progress.best
    self._pending = {name: Mean(*pair) for name, pair in progress.pending.items()}
    self._waiting: list[tuple[int, steps.Metrics]] = []
    self._skipped_in_a_row = 0
    self.tokens, self.skipped = progress.tokens, progress.skipped
    self.clock = Stopwatch("steps", progress.seconds)
    self._logged = (self.tokens, self.clock.seconds()["steps"])
    self._saved_at = self._total_seconds()
    self._eval_step = Compiled(
      steps.eval_step(
        job.forward, job.eval_loss or job.loss, job.mesh, job.predictions
      ),
      self._compiling("evaluation step"),
    )

  def train(self, jitted: Any, state: TrainState, done: int) -> TrainState:
    """Every step after `done`; returns the last state."""
    train_step = Compiled(jitted, self._compiling("training step"))
    for number in range(done + 1, self._plan.total + 1):
      batch = next(self._job.batches)
      if not train_step.ready(batch):
        self._drain()  # What still runs is not to be booked to the compilation.
      state, metrics = train_step(state, self._base, self._spread(batch))
      self._waiting.append((number, metrics))
      self.tokens += int(batch["attention_mask"].sum())
      self._display.step(number)
      at_end = number == self._plan.total
      if at_end or number % self._config.log_steps == 0:
        self._log(number)
      evaluated = at_end or number % self._plan.epoch == 0
      if evaluated:
        self._evaluate(number, state)
      told = not at_end and self._stop.reached(number)
      if evaluated or told or self._save_is_due(number):
        self._save(number, state)
      if told:
        self._checkpoints.wait()
        raise processes.Preempted(number)
    return state

  def _spread(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A batch, which every process has whole, on the devices."""
    sharding = meshes.batch(self._job.mesh)
    return {name: meshes.place(x, sharding) for name, x in batch.items()}

  def best_and_last(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best evaluation (the first of equals), and the last one."""
    assert self._best is not None  # The last step is followed by an evaluation.
    return self._evaluations[self._best], self._evaluations[-1]

  def _compiling(self, what: str):
    @contextlib.contextmanager
    def around(shape: str) -> Iterator[None]:
      before = self.clock.seconds().get("compile", 0.0)
      with self.clock.on("compile"), jax.set_mesh(self._job.mesh):
        yield
      seconds = self.clock.seconds()["compile"] - before
      self._display.say(f"compiled the {what} for {shape} in {seconds:.1f}s")

    return around

  def _drain(self) -> None:
    """Waits for the steps that are under way and adds up their metrics."""
    waiting, self._waiting = self._waiting, []
    for (number, _), metrics in zip(
      waiting, jax.device_get([metrics for _, metrics in waiting]), strict=True
    ):
      found = {name: mean.on_host() for name, mean in metrics.items()}
      wrong = {n: m.total for n, m in found.items() if not math.isfinite(m.total)}
      if wrong:
        name = "loss" if "loss" in wrong else next(iter(wrong))
        self._not_finite(number, name, wrong[name])
        continue
      self._skipped_in_a_row = 0
      for name, new in found.items():
        self._pending[name] = self._pending.get(name, Mean(0.0, 0.0)) + new

  def _not_finite(self, number: int, name: str, value: float) -> None:
    if self._config.on_nonfinite == "stop":
      raise LoraxError(self._diverged(number, name, value))
    self.skipped += 1
    self._skipped_in_a_row += 1
    self._display.say(f"{name} is {value} at step {number}: the step is skipped")
    if self._skipped_in_a_row == _MOST_SKIPPED:
      raise LoraxError(
        f"{_MOST_SKIPPED} steps in a row were not finite and changed nothing. "
        + self._diverged(number, name, value)
      )

  def _diverged(self, number: int, name: str, value: float) -> str:
    self._checkpoints.wait()
    kept = self._checkpoints.latest()
    return (
      f"{name} is {value} at step {number}: training has diverged. A lower "
      "train.learning_rate or train.grad_clip may help. "
      + (f"The checkpoint of step {kept} is kept" if kept else "Nothing was saved yet")
    )

  def _log(self, number: int) -> None:
    self._drain()
    if not self._pending:
      return  # All steps since the last line were skipped, and said so.
    values = {name: mean.value() for name, mean in self._pending.items()}
    self._pending = {}
    epoch = number / self._plan.epoch
    self._record.write(
      number, epoch, {f"train/{name}": value for name, value in values.items()}
    )
    tokens, seconds = self.tokens, self.clock.seconds()["steps"]
    passed = max(seconds - self._logged[1], 1e-9)
    speed = (tokens - self._logged[0]) / passed
    self._logged = (tokens, seconds)
    left = (self._plan.total - number) * seconds / number
    self._record.speed(number, {"speed/tokens_per_second": speed})
    self._display.update(
      number, epoch, values["loss"], values["learning_rate"], speed, left
    )

  def _evaluate(self, number: int, state: TrainState) -> None:
    self._drain()

    def predict(trained, base, batch):
      return self._eval_step(trained, base, self._spread(batch))

    with self.clock.on("evaluate"):
      found = evaluate(
        predict,
        state.trained,
        self._base,
        self._job.evaluation,
        self._job.metrics,
      )
    epoch = number / self._plan.epoch
    self._record.write(
      number, epoch, {f"eval/{name}": value for name, value in found.metrics.items()}
    )
    scores = {
      "eval_loss" if name == "loss" else name: value
      for name, value in found.metrics.items()
    }
    self._evaluations.append(
      {"step": number, "epoch": epoch, "metrics": scores, "examples": found.examples}
    )
    primary = self._job.primary
    if self._best is None or METRICS[primary].better(
      scores[primary], self.best_and_last()[0]["metrics"][primary]
    ):
      self._best = len(self._evaluations) - 1
    shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    self._display.say(f"epoch {epoch:.2f}  {found.examples:,} examples  {shown}")

  def _total_seconds(self) -> float:
    return sum(self.clock.seconds().values())

  def _save_is_due(self, number: int) -> bool:
    if self._plan.save is not None and number % self._plan.save == 0:
      return True
    late = self._total_seconds() - self._saved_at >= self._config.save_seconds
    if jax.process_count() == 1:
      return late
    # Processes have to agree, which takes a moment: where they wait anyway.
    return number % self._config.log_steps == 0 and processes.first_says(late)

  def _save(self, number: int, state: TrainState) -> None:
    self._drain()  # Nothing that is not finite is saved.
    with self.clock.on("save"):
      progress = Progress(
        position=self._job.batches.get_state(),
        pending={
          name: (float(mean.total), float(mean.count))
          for name, mean in self._pending.items()
        },
        evaluations=self._evaluations,
        best=self._best,
        seconds=self.clock.seconds(),
        tokens=self.tokens,
        skipped=self.skipped,
      )
      self._record.flush()
      self._checkpoints.save(number, state, progress)
    self._saved_at = self._total_seconds()
