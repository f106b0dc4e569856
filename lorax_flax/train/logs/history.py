"""What one run has measured: its next line, its evaluations, and which was the best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.train.checkpoint import Progress
from lorax_flax.train.config import Durations
from lorax_flax.train.evaluate import Evaluation
from lorax_flax.train.logs.writer import Record, SilentRecord
from lorax_flax.train.metrics import METRICS, Mean

# Steps in a row that may be skipped, where a run does not stop at the first.
_MOST_SKIPPED = 50


class Diverged(LoraxError):
  """A loss or a gradient is not finite, and that ends the run.

  Attributes:
    step: where.
    reason: in a few words.
  """

  def __init__(self, step: int, reason: str, kept: str = ""):
    super().__init__(
      f"{reason}: training has diverged. A lower train.learning_rate or "
      f"train.grad_clip may help{kept}"
    )
    self.step, self.reason = step, reason


class Ledger:
  """The books of one run, on the host.

  Attributes:
    record: takes the lines.
    name: of the run, before what is said of it; empty where there is only one.
    tokens: trained on so far.
    skipped: steps that changed nothing, since they were not finite.
    failed: why and where the run ended before its time, or None.
  """

  def __init__(
    self,
    record: Record | SilentRecord,
    plan: Durations,
    primary: str,
    on_nonfinite: str,
    progress: Progress,
    name: str = "",
  ):
    self.record, self.name = record, name
    self._plan, self._primary, self._on_nonfinite = plan, primary, on_nonfinite
    self._pending = {name: Mean(*pair) for name, pair in progress.pending.items()}
    self._evaluations = list(progress.evaluations)
    self._best = progress.best
    self._skipped_in_a_row = 0
    self.tokens, self.skipped = progress.tokens, progress.skipped
    self.failed = progress.failed

  def add(self, number: int, metrics: Mapping[str, Mean]) -> str | None:
    """Adds a step's metrics, which are on the host already.

    Returns:
      What there is to say of a step that was skipped.

    Raises:
      Diverged: they are not finite, and that is not to be passed over.
    """
    found = {name: mean.on_host() for name, mean in metrics.items()}
    wrong = {n: m.total for n, m in found.items() if not math.isfinite(m.total)}
    if not wrong:
      self._skipped_in_a_row = 0
      for name, new in found.items():
        self._pending[name] = self._pending.get(name, Mean(0.0, 0.0)) + new
      return None
    name = "loss" if "loss" in wrong else next(iter(wrong))
    reason = f"{name} is {wrong[name]} at step {number}"
    if self._on_nonfinite == "stop":
      raise Diverged(number, reason)
    self.skipped += 1
    self._skipped_in_a_row += 1
    if self._skipped_in_a_row == _MOST_SKIPPED:
      raise Diverged(
        number,
        f"{_MOST_SKIPPED} steps in a row were not finite and changed nothing. {reason}",
      )
    return f"{reason}: the step is skipped"

  def log(self, number: int) -> dict[str, float] | None:
    """Writes the means since the last line, and returns them; None: there are none."""
    if not self._pending:
      return None  # All steps since the last line were skipped, and said so.
    values = {name: mean.value() for name, mean in self._pending.items()}
    self._pending = {}
    self.record.write(
      number,
      number / self._plan.epoch,
      {f"train/{name}": value for name, value in values.items()},
    )
    return values

  def evaluated(self, number: int, found: Evaluation) -> bool:
    """Writes an evaluation; returns whether it is the best so far."""
    epoch = number / self._plan.epoch
    self.record.write(
      number, epoch, {f"eval/{name}": value for name, value in found.metrics.items()}
    )
    metrics = {
      "eval_loss" if name == "loss" else name: value
      for name, value in found.metrics.items()
    }
    self._evaluations.append(
      {"step": number, "epoch": epoch, "metrics": metrics, "examples": found.examples}
    )
    primary = self._primary
    improved = self._best is None or METRICS[primary].better(
      metrics[primary], self.best_and_last()[0]["metrics"][primary]
    )
    if improved:
      self._best = len(self._evaluations) - 1
    return improved

  def last_evaluation(self) -> str:
    """The last evaluation in a line."""
    last = self._evaluations[-1]
    shown = "  ".join(f"{name} {value:.4f}" for name, value in last["metrics"].items())
    return f"epoch {last['epoch']:.2f}  {last['examples']:,} examples  {shown}"

  def best_and_last(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best evaluation (the first of equals), and the last one."""
    assert self._best is not None  # The last step is followed by an evaluation.
    return self._evaluations[self._best], self._evaluations[-1]

  def progress(
    self, position: Mapping[str, Any], seconds: Mapping[str, float]
  ) -> Progress:
    """What a checkpoint holds of this run."""
    return Progress(
      position=dict(position),
      pending={
        name: (float(mean.total), float(mean.count))
        for name, mean in self._pending.items()
      },
      evaluations=self._evaluations,
      best=self._best,
      seconds=dict(seconds),
      tokens=self.tokens,
      skipped=self.skipped,
      failed=self.failed,
    )

  def result(
    self, trained_parameters: int, seconds: Mapping[str, float]
  ) -> dict[str, Any]:
    """What result.json says of the run, but for where things lie."""
    best, last = self.best_and_last()
    return {
      **best["metrics"],
      "primary_metric": self._primary,
      "best_step": best["step"],
      "best_epoch": best["epoch"],
      "steps": self._plan.total,
      "epochs": self._plan.total / self._plan.epoch,
      "last": last["metrics"],
      "examples_evaluated": best["examples"],
      "trained_parameters": trained_parameters,
      "train_seconds": sum(seconds.values()),
      "seconds": dict(seconds),
      "skipped_steps": self.skipped,
      "tokens": self.tokens,
      "tokens_per_second": self.tokens / seconds["steps"] if seconds["steps"] else 0.0,
    }


def say_of(ledger: Ledger, line: str) -> str:
  """A line about a run, with its name where there are several."""
  return f"{ledger.name}  {line}" if ledger.name else line


def running(ledgers: Sequence[Ledger]) -> list[Ledger]:
  """Those that have not failed."""
  return [ledger for ledger in ledgers if ledger.failed is None]
