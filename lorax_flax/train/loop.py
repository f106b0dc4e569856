"""The training loop: step, log, evaluate, save and resume, over one run or several."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from lorax_flax.adapt.partition import combine, partition, trainable_mask
from lorax_flax.distributed import processes
from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket, workdir
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import step as steps
from lorax_flax.train import trials
from lorax_flax.train.checkpoint import Checkpoints, Progress
from lorax_flax.train.compile_by_shape import Compiled
from lorax_flax.train.config import Durations, durations
from lorax_flax.train.evaluate import Batches, NotFinite, evaluate
from lorax_flax.train.logs import confusion, curves, memory, page
from lorax_flax.train.logs.history import Diverged, History, running
from lorax_flax.train.logs.progress_bar import Display
from lorax_flax.train.logs.timer import Stopwatch
from lorax_flax.train.logs.writer import Record, SilentRecord
from lorax_flax.train.objective import Objective
from lorax_flax.train.samples import Samples
from lorax_flax.train.trials import Run

PyTree = Any
Seconds = Mapping[str, float]
Program = steps.Program | trials.Program
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
  """Batches to train and to evaluate on.

  Attributes:
    batches: an endless iterator over training batches, with `get_state()`, which is
      JSON-able, and `set_state()`. Of several runs each array has a leading axis, over
      the runs.
    steps_per_epoch: number of batches in an epoch.
    evaluation: batches by the split's name, the same for all runs.
  """

  batches: Any
  steps_per_epoch: int
  evaluation: Mapping[str, Batches]


@dataclass(frozen=True)
class Job:
  """N >= 1 runs on one base; those after the first differ in `trials.MAY_DIFFER`.

  Attributes:
    fingerprints: digests of what the runs are made from, by name.
    samples: prompts that a run which trains alone, in one process, answers.
  """

  runs: Sequence[Run]
  model: steps.Model
  objective: Objective
  data: Data
  fingerprints: Mapping[str, str] = field(default_factory=dict)
  samples: Samples | None = None


def fit(
  job: Job, folder: Path, width: int | None = None
) -> list[dict[str, Any] | Diverged]:
  """Trains to the end, resuming from the last checkpoint in `folder`, if any.

  A run that was killed and resumed ends with the same weights, the same metrics and the
  same metrics.jsonl, bit for bit, as one that was not. It may resume on another mesh or
  number of processes, and is then the same to rounding.

  Args:
    folder: of the checkpoints; claimed by these runs (`workdir.claim`), as are theirs.
    width: number of runs that go through the model at once, the others following in the
      same program; None: as many as the devices' caches have room for, on a CPU one.

  Returns:
    For each run the content of its result.json: the metrics of the best evaluation by
    name (whose adapter is exported), those of the last one, and figures. For a run
    whose loss or gradient was not finite the error: the others go on.

  Raises:
    LoraxError: two of the runs differ in more than they may.
    processes.Preempted: SIGTERM asked for it; everything is saved.
  """
  plan = durations(job.runs[0].config, job.data.steps_per_epoch)
  program = program_of(job, plan, width)
  state, base = program.start()
  batches = job.data.batches
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(processes.StopRequest())
    checkpoints = Checkpoints(folder / workdir.CHECKPOINTS)
    stack.enter_context(_closing(checkpoints))
    progress = [Progress(position=batches.get_state()) for _ in job.runs]
    done = checkpoints.latest() or 0
    if done:
      state, progress = checkpoints.restore(done, state)
      batches.set_state(progress[0].position)
      log.info("resuming after step %d of %d", done, plan.total)
    first, histories = processes.first(), []
    for run, own in zip(job.runs, progress, strict=True):
      record = Record(run.folder, done) if first else SilentRecord()
      stack.enter_context(_closing(record))
      reaction = run.config.on_nonfinite
      histories.append(History(record, plan, job.objective, reaction, own, run.name))
    unit, quiet = job.objective.throughput.unit, not first
    display = stack.enter_context(Display(plan.total, done, unit, quiet))
    clock = Stopwatch("steps", progress[0].seconds)
    loop = _Loop(job, plan, program, histories, checkpoints, display, stop, clock)
    state = loop.train(state, base, done)
    checkpoints.wait()

    def restored() -> PyTree:
      step = histories[0].best_and_last()[0]["step"]
      return state if step == plan.total else checkpoints.restore(step, state)[0]

    best: list[Adapter] = [{}] * len(histories)
    if running(histories):
      best = program.best(state, restored)
    kept, seconds = checkpoints.latest(), clock.seconds()
    results = [
      _finish(run, history, trained, kept, seconds)
      for run, history, trained in zip(job.runs, histories, best, strict=True)
    ]
    processes.barrier("the results are written")
  return results


def program_of(job: Job, plan: Durations, width: int | None = None) -> Program:
  """The steps that train a job. A single run compiles without an axis over runs."""
  if len(job.runs) > 1:
    return trials.program(job.runs, plan, job.model, job.objective, width)
  [run] = job.runs
  return steps.program(run.config, plan, job.model, job.objective, run.adapter)


_NOTHING = "Nothing was saved yet"


class _AllDiverged(Exception):
  """No run is left to train."""


@dataclass
class _Loop:
  """State of the loop on the host; `clock` is started."""

  job: Job
  plan: Durations
  program: Program
  histories: Sequence[History]
  checkpoints: Checkpoints
  display: Display
  stop: processes.StopRequest
  clock: Stopwatch

  def __post_init__(self):
    # Of its fields, those that all runs have in common.
    self._config, self._data = self.job.runs[0].config, self.job.data
    self._pending: list[tuple[int, PyTree]] = []
    self._logged = (self._work(), self.clock.seconds()["steps"])
    self._saved_at = self._total_seconds()
    self._eval_step = Compiled(
      self.program.eval_step, self._compiling("evaluation step")
    )

  def train(self, state: PyTree, base: PyTree, done: int) -> PyTree:
    """Takes every step after `done`; returns the last state.

    Raises:
      processes.Preempted: SIGTERM asked for it; everything is saved.
    """
    with contextlib.suppress(_AllDiverged):
      self._check_running()
      if not done:
        self._answer(0, state, base)
      train_step = Compiled(self.program.step, self._compiling("training step"))
      for number in range(done + 1, self.plan.total + 1):
        batch = next(self._data.batches)
        if not train_step.ready(batch):
          self._drain()  # Steps still running are not to be timed as compilation.
        placed = self._place(batch, self.program.batch)
        state, metrics = train_step(state, base, placed)
        self._pending.append((number, metrics))
        for history, own in zip(
          self.histories, self.program.unstack(batch), strict=True
        ):
          history.tokens += self.job.objective.throughput.count(own)
        self.display.step(number)
        at_end = number == self.plan.total
        if at_end or number % self._config.log_steps == 0:
          self._log(number)
        evaluated = at_end or number % self.plan.epoch == 0
        if evaluated:
          state = self._evaluate(number, state, base)
          self._answer(number, state, base)
        stopping = not at_end and self.stop.reached(number)
        if evaluated or stopping or self._save_is_due(number):
          self._save(number, state)
        if evaluated and self._data.evaluation:
          self._report(number)
        if stopping:
          self.checkpoints.wait()
          raise processes.Preempted(number)
    return state

  def _place(
    self, batch: Mapping[str, Any], sharding: NamedSharding
  ) -> dict[str, jax.Array]:
    """Puts a batch, which every process has in full, on the devices."""
    return {name: meshes.place(x, sharding) for name, x in batch.items()}

  def _compiling(self, what: str) -> Callable[[str], Any]:
    @contextlib.contextmanager
    def timed(shape: str) -> Iterator[None]:
      before = self.clock.seconds().get("compile", 0.0)
      with self.clock.on("compile"), jax.set_mesh(self.job.model.mesh):
        yield
      seconds = self.clock.seconds()["compile"] - before
      log.info("compiled the %s for %s in %.1fs", what, shape, seconds)

    return timed

  def _drain(self) -> None:
    """Waits for the steps that still run, and adds up their metrics."""
    pending, self._pending = self._pending, []
    for (number, _), metrics in zip(
      pending, jax.device_get([metrics for _, metrics in pending]), strict=True
    ):
      each = self.program.unstack(metrics)
      for history, own in zip(self.histories, each, strict=True):
        history.add(number, own)
    self._check_running()

  def _check_running(self) -> None:
    if not running(self.histories):
      raise _AllDiverged

  def _log(self, number: int) -> None:
    self._drain()
    lines = [history.log(number) for history in running(self.histories)]
    values = [line for line in lines if line is not None]
    if not values:
      return
    work, seconds = self._work(), self.clock.seconds()["steps"]
    passed = max(seconds - self._logged[1], 1e-9)
    speed = (work - self._logged[0]) / passed
    self._logged = (work, seconds)
    left = (self.plan.total - number) * seconds / number
    name = f"speed/{self.job.objective.throughput.unit}_per_second"
    peak = memory.peak()
    for history in running(self.histories):
      history.record.events(number, {name: speed, "memory/peak_bytes": peak})
    self.display.update(
      number,
      number / self.plan.epoch,
      [line["loss"] for line in values],
      [line["learning_rate"] for line in values],
      speed,
      peak,
      left,
    )

  def _evaluate(self, number: int, state: PyTree, base: PyTree) -> PyTree:
    self._drain()
    splits, improved = self._data.evaluation, [False] * len(self.histories)
    objective = self.job.objective
    if not splits:
      return state
    with self.clock.on("evaluate"):
      sharding = meshes.batch(self.job.model.mesh)
      outputs = {  # Not waited for one by one.
        split: [
          self._eval_step(state.trained, base, self._place(batch, sharding))
          for batch in batches
        ]
        for split, batches in splits.items()
      }
      each = {
        split: [self.program.unstack(output) for output in found]
        for split, found in jax.device_get(outputs).items()
      }
      for i, history in enumerate(self.histories):
        if history.failed is None:
          own = {split: [parts[i] for parts in found] for split, found in each.items()}
          try:
            found = evaluate(own, splits, objective.metrics, objective.report)
          except NotFinite as error:
            history.fail(number, f"{error} at step {number}")
          else:
            improved[i] = history.evaluated(number, found)
    return self.program.keep_best(state, improved)

  def _answer(self, number: int, state: PyTree, base: PyTree) -> None:
    """Answers the prompts, before the step's checkpoint: it is never without them."""
    samples, [*alive] = self.job.samples, running(self.histories)
    if samples is None or not alive:
      return
    self._drain()
    with self.clock.on("answer"), jax.set_mesh(self.job.model.mesh):
      try:
        found = samples.answer(base.params, base.adapter(state.trained))
      except LoraxError as error:  # An answer is no reason to stop a run.
        log.warning("the prompts are not answered at step %d: %s", number, error)
        return
    for history in alive:
      history.answered(samples.lines(number, found))

  def _report(self, number: int) -> None:
    status = f"Under way: {number:,} of {self.plan.total:,} steps are done."
    for run, history in zip(self.job.runs, self.histories, strict=True):
      if history.failed is None:
        try:
          _report(run, history, status)
        except OSError as error:  # A page is no reason to stop a run.
          log.warning("%s: %s", workdir.REPORT, error)

  def _work(self) -> int:
    return sum(history.tokens for history in self.histories)

  def _total_seconds(self) -> float:
    return sum(self.clock.seconds().values())

  def _save_is_due(self, number: int) -> bool:
    if self.plan.save is not None and number % self.plan.save == 0:
      return True
    late = self._total_seconds() - self._saved_at >= self._config.save_seconds
    if jax.process_count() == 1:
      return late
    # Processes have to agree, which takes a moment: where they wait anyway.
    return number % self._config.log_steps == 0 and processes.broadcast(late)

  def _save(self, number: int, state: PyTree) -> None:
    self._drain()  # Nothing that is not finite is saved.
    with self.clock.on("save"):
      position, seconds = self._data.batches.get_state(), self.clock.seconds()
      each = [history.progress(position, seconds) for history in self.histories]
      for history in self.histories:
        history.record.flush()
      self.checkpoints.save(number, state, each)
    self._saved_at = self._total_seconds()


def _finish(
  run: Run, history: History, trained: Adapter, kept: int | None, seconds: Seconds
) -> dict[str, Any] | Diverged:
  """Writes a run's result and exports its best adapter.

  Args:
    trained: the trained leaves at the best evaluation.
    kept: step of the last checkpoint.
    seconds: wall time by what it was spent on.
  """
  if history.failed is not None:
    advice = f"The checkpoint of step {kept} is kept" if kept else _NOTHING
    diverged = Diverged(**history.failed, kept=f". {advice}")
    _report(run, history, f"Ended at step {diverged.step:,}: {diverged}")
    return diverged
  rest = partition(run.adapter, trainable_mask(run.adapter))[1]
  adapter = meshes.gather(combine(trained, rest))
  size = sum(x.size for x in jax.tree.leaves(trained))
  result = history.result(size, seconds)
  with bucket.staging(run.folder) as here:
    paths = run.export(adapter, result, here)
  result |= {n: str(run.folder / Path(p).relative_to(here)) for n, p in paths.items()}
  if processes.first():
    title = run.about.title
    curves.draw(run.folder / workdir.CURVES, history.record.lines, title)
    if table := result.get("report", {}).get("confusion"):
      confusion.draw(run.folder / workdir.CONFUSION, table, title)
    _report(run, history, "Finished.", result)
    workdir.write_json(run.folder / workdir.RESULT, result)
  return result


def _report(
  run: Run, history: History, status: str, result: Mapping[str, Any] | None = None
) -> None:
  """Writes report.html anew; process 0 alone."""
  if processes.first():
    best = history.best_and_last()[0]["step"]
    record = history.record
    text = page.render(run.about, record.lines, best, status, result, record.samples)
    workdir.write_text(run.folder / workdir.REPORT, text)


@contextlib.contextmanager
def _closing(resource: Checkpoints | Record | SilentRecord) -> Iterator[None]:
  """Closes it on exit; after an error, that error is the one raised."""
  try:
    yield
  except BaseException:
    # Of several processes this one alone may have failed: closing would wait for the
    # others, who wait for it. It will end at once.
    if jax.process_count() == 1:
      with contextlib.suppress(Exception):
        resource.close()
    raise
  resource.close()
