"""The loop over steps: of one run, or of several that take each step together."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from lorax_flax.distributed import processes
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train.checkpoint import Checkpoints, Progress
from lorax_flax.train.compile_by_shape import Compiled
from lorax_flax.train.config import Durations, TrainConfig
from lorax_flax.train.evaluate import Batches, evaluate
from lorax_flax.train.logs.history import Diverged, Ledger, running, say_of
from lorax_flax.train.logs.progress_bar import Display
from lorax_flax.train.logs.timer import Stopwatch

PyTree = Any


@dataclass(frozen=True)
class Work:
  """What is done at each step, to the state of one run or of several.

  Attributes:
    step: (state, base, batch) -> (state, metrics), jitted.
    eval_step: (state.trained, base, batch) -> (predictions, mean loss), jitted.
    base: what a step reads and does not change.
    batches: an endless iterator with `get_state()` and `set_state()`.
    evaluation: batches by the split's name, the same for all runs.
    metrics: their names.
    mesh: the devices.
    lies: how a training batch lies on them.
    apart: a tree that a step takes or gives, as one for each run.
    diverged: told of a run that ended before its time; raises, or lets the others go
      on.
    evaluated: (state, for each run whether this evaluation was its best) -> state.
    progress: what a checkpoint holds of all runs, from what it holds of each.
  """

  step: Any
  eval_step: Any
  base: PyTree
  batches: Any
  evaluation: Mapping[str, Batches]
  metrics: Sequence[str]
  mesh: Mesh
  lies: NamedSharding
  apart: Callable[[PyTree], list[PyTree]]
  diverged: Callable[[Ledger, Diverged], None]
  evaluated: Callable[[PyTree, Sequence[bool]], PyTree]
  progress: Callable[[list[Progress]], Any]


class Drive:
  """What the loop carries on the host from step to step."""

  def __init__(
    self,
    config: TrainConfig,
    plan: Durations,
    work: Work,
    ledgers: Sequence[Ledger],
    checkpoints: Checkpoints,
    display: Display,
    stop: processes.StopRequest,
    seconds: Mapping[str, float],
  ):
    """`config`: of its fields, those that all runs have in common."""
    self._config, self._plan, self._work = config, plan, work
    self._ledgers, self._checkpoints = ledgers, checkpoints
    self._display, self._stop = display, stop
    self._waiting: list[tuple[int, PyTree]] = []
    self.clock = Stopwatch("steps", seconds)
    self._logged = (self._tokens(), self.clock.seconds()["steps"])
    self._saved_at = self._total_seconds()
    self._eval_step = Compiled(work.eval_step, self._compiling("evaluation step"))

  def train(self, state: PyTree, done: int) -> PyTree:
    """Every step after `done`; returns the last state.

    Raises:
      processes.Preempted: SIGTERM asked for it; all is saved.
    """
    work = self._work
    train_step = Compiled(work.step, self._compiling("training step"))
    for number in range(done + 1, self._plan.total + 1):
      batch = next(work.batches)
      if not train_step.ready(batch):
        self._drain()  # What still runs is not to be booked to the compilation.
      state, metrics = train_step(state, work.base, self._spread(batch, work.lies))
      self._waiting.append((number, metrics))
      for ledger, own in zip(self._ledgers, work.apart(batch), strict=True):
        ledger.tokens += int(own["attention_mask"].sum())
      self._display.step(number)
      at_end = number == self._plan.total
      if at_end or number % self._config.log_steps == 0:
        self._log(number)
      evaluated = at_end or number % self._plan.epoch == 0
      if evaluated:
        state = self._evaluate(number, state)
      told = not at_end and self._stop.reached(number)
      if evaluated or told or self._save_is_due(number):
        self._save(number, state)
      if told:
        self._checkpoints.wait()
        raise processes.Preempted(number)
      if not running(self._ledgers):
        break
    return state

  def _spread(
    self, batch: Mapping[str, Any], lies: NamedSharding
  ) -> dict[str, jax.Array]:
    """A batch, which every process has whole, on the devices."""
    return {name: meshes.place(x, lies) for name, x in batch.items()}

  def _compiling(self, what: str):
    @contextlib.contextmanager
    def around(shape: str) -> Iterator[None]:
      before = self.clock.seconds().get("compile", 0.0)
      with self.clock.on("compile"), jax.set_mesh(self._work.mesh):
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
      for ledger, own in zip(self._ledgers, self._work.apart(metrics), strict=True):
        if ledger.failed is not None:
          continue
        try:
          if line := ledger.add(number, own):
            self._display.say(say_of(ledger, line))
        except Diverged as error:
          self._work.diverged(ledger, error)

  def _log(self, number: int) -> None:
    self._drain()
    lines = [ledger.log(number) for ledger in running(self._ledgers)]
    values = [line for line in lines if line is not None]
    if not values:
      return
    tokens, seconds = self._tokens(), self.clock.seconds()["steps"]
    passed = max(seconds - self._logged[1], 1e-9)
    speed = (tokens - self._logged[0]) / passed
    self._logged = (tokens, seconds)
    left = (self._plan.total - number) * seconds / number
    for ledger in running(self._ledgers):
      ledger.record.speed(number, {"speed/tokens_per_second": speed})
    self._display.update(
      number,
      number / self._plan.epoch,
      [line["loss"] for line in values],
      [line["learning_rate"] for line in values],
      speed,
      left,
    )

  def _evaluate(self, number: int, state: PyTree) -> PyTree:
    self._drain()
    work, improved = self._work, [False] * len(self._ledgers)
    with self.clock.on("evaluate"):
      sharding = meshes.batch(work.mesh)
      outputs = {  # Not waited for, one by one.
        split: [
          self._eval_step(state.trained, work.base, self._spread(batch, sharding))
          for batch in batches
        ]
        for split, batches in work.evaluation.items()
      }
      each = {
        split: [work.apart(output) for output in found]
        for split, found in jax.device_get(outputs).items()
      }
      for i, ledger in enumerate(self._ledgers):
        if ledger.failed is not None:
          continue
        own = {split: [parts[i] for parts in found] for split, found in each.items()}
        found = evaluate(own, work.evaluation, work.metrics)
        improved[i] = ledger.evaluated(number, found)
        self._display.say(say_of(ledger, ledger.last_evaluation()))
    return work.evaluated(state, improved)

  def _tokens(self) -> int:
    return sum(ledger.tokens for ledger in self._ledgers)

  def _total_seconds(self) -> float:
    return sum(self.clock.seconds().values())

  def _save_is_due(self, number: int) -> bool:
    if self._plan.save is not None and number % self._plan.save == 0:
      return True
    late = self._total_seconds() - self._saved_at >= self._config.save_seconds
    if jax.process_count() == 1:
      return late
    # Processes have to agree, which takes a moment: where they wait anyway.
    return number % self._config.log_steps == 0 and processes.broadcast(late)

  def _save(self, number: int, state: PyTree) -> None:
    self._drain()  # Nothing that is not finite is saved.
    with self.clock.on("save"):
      position, seconds = self._work.batches.get_state(), self.clock.seconds()
      each = [ledger.progress(position, seconds) for ledger in self._ledgers]
      for ledger in self._ledgers:
        ledger.record.flush()
      self._checkpoints.save(number, state, self._work.progress(each))
    self._saved_at = self._total_seconds()
