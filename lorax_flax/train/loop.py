"""The training loop: step, log, evaluate, save and resume, over one run or several."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from lorax_flax.distributed import processes
from lorax_flax.errors import LoraxError
from lorax_flax.files import workdir
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import ending, judging, places, trials
from lorax_flax.train import step as steps
from lorax_flax.train.checkpoint import Checkpoints
from lorax_flax.train.compile_by_shape import Compiled
from lorax_flax.train.config import Durations, durations
from lorax_flax.train.evaluate import Batches, NotFinite, evaluate
from lorax_flax.train.judging import Judge, Standing
from lorax_flax.train.logs import memory
from lorax_flax.train.logs.history import Diverged
from lorax_flax.train.logs.progress_bar import Display
from lorax_flax.train.logs.timer import Stopwatch
from lorax_flax.train.objective import Objective
from lorax_flax.train.places import Places, Seat
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
      the runs (`pipeline.Together`).
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
    samples: prompts that each run answers, in one process.
    places: number of runs that train at the same time; as one ends, the next one takes
      its place. None: all of them.
    judge: (number of steps of a run, primary metric) -> the rule by which runs are
      stopped early; None: none is.
    watch: called by process 0 with the standings of all runs, whenever they change.
  """

  runs: Sequence[Run]
  model: steps.Model
  objective: Objective
  data: Data
  fingerprints: Mapping[str, str] = field(default_factory=dict)
  samples: Samples | None = None
  places: int | None = None
  judge: Callable[[int, str], Judge] | None = None
  watch: Callable[[Sequence[Standing]], None] = lambda standings: None


def fit(
  job: Job, folder: Path, width: int | None = None
) -> list[dict[str, Any] | Diverged | None]:
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
    whose loss or gradient was not finite the error: the others go on. None for a run
    that the judge has stopped.

  Raises:
    LoraxError: two of the runs differ in more than they may.
    processes.Preempted: SIGTERM asked for it; everything is saved.
  """
  plan = durations(job.runs[0].config, job.data.steps_per_epoch)
  count = min(job.places or len(job.runs), len(job.runs))
  total = -(-plan.total * len(job.runs) // count)
  batches = job.data.batches
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(processes.StopRequest())
    checkpoints = Checkpoints(folder / workdir.CHECKPOINTS)
    stack.enter_context(_closing(checkpoints))
    done = checkpoints.latest() or 0
    progress = places.first(len(job.runs), count, batches.get_state())
    if done:
      progress = [
        places.checked(own, run.folder)
        for own, run in zip(checkpoints.progress(done), job.runs, strict=True)
      ]
      log.info("resuming after step %d of %d", done, total)
    seats = Places(job.runs, count, plan, job.objective, progress, done)
    stack.enter_context(_closing(seats))
    seated = [0 if seat is None else seat.number for seat in seats.seats]
    program = program_of(job, plan, width, seated)
    state, base = program.start()
    for _, seat in seats.seated():
      seat.run.started()
    if done:
      state = checkpoints.restore(done, state)
      batches.set_state(progress[0].position)
    unit, quiet = job.objective.throughput.unit, not processes.first()
    display = stack.enter_context(Display(total, done, unit, quiet))
    clock = Stopwatch("steps", progress[0].seconds)
    loop = _Loop(job, plan, program, seats, checkpoints, display, stop, clock)
    loop.train(state, base, done)
    processes.barrier("the results are written")
  over = range(len(job.runs))
  return [loop.results.get(n) or seats.ended(n) for n in over]


def program_of(
  job: Job, plan: Durations, width: int | None = None, seated: Sequence[int] = ()
) -> Program:
  """The steps that train a job. A single run compiles without an axis over runs.

  Args:
    seated: number of the run in each place; all of them by default.
  """
  if len(job.runs) > 1:
    numbers = seated or range(len(job.runs))
    cut = job.data.batches.cut
    return trials.program(job.runs, numbers, plan, job.model, job.objective, width, cut)
  [run] = job.runs
  return steps.program(run.config, plan, job.model, job.objective, run.adapter)


class _AllDiverged(Exception):
  """No run is left to train."""


@dataclass
class _Loop:
  """State of the loop on the host; `clock` is started."""

  job: Job
  plan: Durations
  program: Program
  places: Places
  checkpoints: Checkpoints
  display: Display
  stop: processes.StopRequest
  clock: Stopwatch

  def __post_init__(self):
    # Of its fields, those that all runs have in common.
    self._config, self._data = self.job.runs[0].config, self.job.data
    self._pending: list[tuple[int, PyTree]] = []
    self._tokens = self.places.tokens()
    self._logged = (self._tokens, self.clock.seconds()["steps"])
    self._saved_at = self._total_seconds()
    self._eval_step = Compiled(
      self.program.eval_step, self._compiling("evaluation step")
    )
    self._judge: Judge | None = None
    self._sample: Mapping[str, Batches] = {}
    if self.job.judge is not None:
      self._judge = self.job.judge(self.plan.total, self.job.objective.primary)
      self._sample = judging.sample(self._data.evaluation, self._judge.examples)
    self.results: dict[int, dict[str, Any] | Diverged | None] = {}

  def train(self, state: PyTree, base: PyTree, done: int) -> None:
    """Takes every step after `done`, and gives each run its result.

    Raises:
      processes.Preempted: SIGTERM asked for it; everything is saved.
    """
    total, epoch = self.plan.total, self.plan.epoch
    # Where nothing is measured at the end of an epoch, it is a step like any other.
    measures = bool(self._data.evaluation) or self.job.samples is not None
    number = done
    if self.places.waiting() and not done:
      self._arrange()
    with contextlib.suppress(_AllDiverged):
      state, base = self._take_turns(number, state, base)
      self._watch(number)
      if not done:
        self._answer(0, self.places.training(), state, base)
      train_step = Compiled(self.program.step, self._compiling("training step"))
      while self.places.any():
        number += 1
        batch = next(self._data.batches)
        if not train_step.ready(batch):
          self._drain()  # Steps still running are not to be timed as compilation.
        placed = self._place(batch, self.program.batch)
        state, metrics = train_step(state, base, placed)
        self._pending.append((number, metrics))
        each = self.program.unstack(batch)
        for place, seat in self.places.seated():
          count = self.job.objective.throughput.count(each[place])
          seat.history.tokens += count
          self._tokens += count
        self.display.step(self.places.mean_step(number))
        if logged := self._due(
          number, lambda n: n == total or n % self._config.log_steps == 0
        ):
          self._log(number, logged)
        if evaluated := self._due(
          number, lambda n: n == total or (measures and n % epoch == 0)
        ):
          state = self._evaluate(number, evaluated, state, base)
          self._answer(number, evaluated, state, base)
        if judged := self._due(number, self._is_judged):
          self._judge_all(number, judged, state, base)
        stopping = not self._at_end(number) and self.stop.reached(number)
        if evaluated or stopping or self._save_is_due(number):
          self._save(number, state)
        if evaluated and self._data.evaluation:
          self._report(number, evaluated)
        if stopping:
          self.checkpoints.wait()
          raise processes.Preempted(number)
        # Not whenever a loss happens to be looked at: the turns do not depend on when
        # a job was interrupted.
        if logged or evaluated or judged:
          state, base = self._take_turns(number, state, base)
        if evaluated or judged:
          self._watch(number)
    for place, _ in self.places.seated():
      self._finish(place, number, state)
    self._watch(number)

  def _watch(self, number: int) -> None:
    if processes.first():
      self.job.watch(self.places.standings(number))

  def _due(self, number: int, when: Callable[[int], bool]) -> list[tuple[int, Seat]]:
    """The places whose run trains and has taken a number of steps `when` names."""
    return [
      (place, seat)
      for place, seat in self.places.training()
      if when(number - seat.start)
    ]

  def _at_end(self, number: int) -> bool:
    """True after the last step of all."""
    left = [s for _, s in self.places.training() if number - s.start < self.plan.total]
    return not left and not self.places.waiting()

  def _take_turns(
    self, number: int, state: PyTree, base: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Finishes the runs that are over, and gives their places to those that wait."""
    seated = False
    for place, seat in [*self.places.seated()]:
      if seat.trains and number - seat.start < self.plan.total:
        continue
      self._finish(place, number, state)
      new = self.places.next(place, number, self.clock.seconds())
      if new is None:
        state = self.program.vacate(state, place)
      else:
        assert isinstance(self.program, trials.Program)
        state, base = self.program.seat(state, base, place, new.run)
        new.run.started()
        seated = True
    if seated:
      self._arrange()
    return state, base

  def _arrange(self) -> None:
    """Gives each place the batches of its run; an empty one gets those of another."""
    [(_, some), *_] = self.places.seated()
    seats = [some if seat is None else seat for seat in self.places.seats]
    self._data.batches.arrange(
      [seat.run.config.seed for seat in seats], [seat.start for seat in seats]
    )

  def _finish(self, place: int, number: int, state: PyTree) -> None:
    """Writes the result of the run in a place, which is over."""
    seat = self.places.seats[place]
    assert seat is not None
    self.checkpoints.wait()
    history, kept = seat.history, self.checkpoints.latest()

    def restored() -> PyTree:
      step = history.best_and_last()[0]["step"]
      return state if step == number else self.checkpoints.restore(step, state)

    trained: Adapter = {}
    if seat.trains:
      trained = self.program.best(state, place, seat.run, restored)
    seconds = seat.seconds(self.clock.seconds())
    self.results[seat.number] = ending.finish(seat.run, history, trained, kept, seconds)

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
      for place, seat in self.places.training():
        seat.history.add(number - seat.start, each[place])
    if not self.places.training() and not self.places.waiting():
      raise _AllDiverged

  def _log(self, number: int, due: Sequence[tuple[int, Seat]]) -> None:
    self._drain()
    running = [(number - seat.start, seat) for _, seat in due if seat.trains]
    lines = [seat.history.log(step) for step, seat in running]
    values = [line for line in lines if line is not None]
    if not values:
      return
    seconds, mean = self.clock.seconds()["steps"], self.places.mean_step(number)
    passed = max(seconds - self._logged[1], 1e-9)
    speed = (self._tokens - self._logged[0]) / passed
    self._logged = (self._tokens, seconds)
    left = (self.display.total - mean) * seconds / number
    name = f"speed/{self.job.objective.throughput.unit}_per_second"
    peak = memory.peak()
    for step, seat in running:
      seat.history.record.events(step, {name: speed, "memory/peak_bytes": peak})
    self.display.update(
      mean,
      mean / self.plan.epoch,
      [line["loss"] for line in values],
      [line["learning_rate"] for line in values],
      speed,
      peak,
      left,
    )

  def _predict(
    self,
    due: Sequence[tuple[int, Seat]],
    splits: Mapping[str, Batches],
    state: PyTree,
    base: PyTree,
  ) -> list[dict[str, list[Any]]]:
    """Results of the evaluation step for these places, by split."""
    sharding = meshes.batch(self.job.model.mesh)
    places = [place for place, _ in due]
    asked = self.program.evaluated(
      state, [place in places for place in range(self.program.places)]
    )
    outputs = {  # Not waited for one by one.
      split: [
        self._eval_step(asked, base, self._place(batch, sharding)) for batch in batches
      ]
      for split, batches in splits.items()
    }
    each = {
      split: [self.program.unstack(output) for output in found]
      for split, found in jax.device_get(outputs).items()
    }
    return [
      {split: [parts[place] for parts in found] for split, found in each.items()}
      for place in places
    ]

  def _evaluate(
    self, number: int, due: Sequence[tuple[int, Seat]], state: PyTree, base: PyTree
  ) -> PyTree:
    self._drain()
    splits, objective = self._data.evaluation, self.job.objective
    if not splits:
      return state
    improved = [False] * self.program.places
    with self.clock.on("evaluate"):
      outputs = self._predict(due, splits, state, base)
      for (place, seat), own in zip(due, outputs, strict=True):
        if not seat.trains:
          continue
        step, history = number - seat.start, seat.history
        try:
          found = evaluate(own, splits, objective.metrics, objective.report)
        except NotFinite as error:
          history.fail(step, f"{error} at step {step}")
        else:
          improved[place] = history.evaluated(step, found)
    return self.program.keep_best(state, improved)

  def _is_judged(self, step: int) -> bool:
    return self._judge is not None and step in self._judge.steps

  def _judge_all(
    self, number: int, due: Sequence[tuple[int, Seat]], state: PyTree, base: PyTree
  ) -> None:
    """Scores runs on a sample of the held-out examples, and stops those that lose."""
    judge, objective = self._judge, self.job.objective
    assert judge is not None
    self._drain()
    with self.clock.on("evaluate"):
      outputs = self._predict(due, self._sample, state, base)
      for (_, seat), own in zip(due, outputs, strict=True):
        if not seat.trains:
          continue
        step = number - seat.start
        try:
          found = evaluate(own, self._sample, objective.metrics)
        except NotFinite as error:
          seat.history.fail(step, f"{error} at step {step}")
        else:
          seat.history.scores.append((step, found.named()[objective.primary]))
    for _, seat in due:
      if not seat.trains:
        continue
      step, score = seat.history.scores[-1]
      if judge.prunes(self.places.standings(number), seat.number):
        shown = f"{objective.primary} {score:.4f} of a sample"
        seat.history.prune(step, f"{judge.name} stops it at {shown}")

  def _answer(
    self, number: int, due: Sequence[tuple[int, Seat]], state: PyTree, base: PyTree
  ) -> None:
    """Answers the prompts, before the step's checkpoint: it is never without them."""
    samples, alive = self.job.samples, [(p, seat) for p, seat in due if seat.trains]
    if samples is None or not alive:
      return
    self._drain()
    with self.clock.on("answer"), jax.set_mesh(self.job.model.mesh):
      for place, seat in alive:
        step = number - seat.start
        try:
          found = samples.answer(*self.program.full(state, base, place))
        except LoraxError as error:  # An answer is no reason to stop a run.
          log.warning("the prompts are not answered at step %d: %s", step, error)
          return
        seat.history.answered(samples.lines(step, found))

  def _report(self, number: int, due: Sequence[tuple[int, Seat]]) -> None:
    for seat in [seat for _, seat in due if seat.trains]:
      done, total = number - seat.start, self.plan.total
      try:
        status = f"Under way: {done:,} of {total:,} steps are done."
        ending.report(seat.run, seat.history, status)
      except OSError as error:  # A page is no reason to stop a run.
        log.warning("%s: %s", workdir.REPORT, error)

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
      for _, seat in self.places.seated():
        seat.history.record.flush()
      self.checkpoints.save(number, state, self.places.progress(position, seconds))
    self._saved_at = self._total_seconds()


@contextlib.contextmanager
def _closing(resource: Checkpoints | Places) -> Iterator[None]:
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
