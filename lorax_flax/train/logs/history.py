"""The metrics of one run: its next line, its evaluations, and which was the best."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.train.checkpoint import Progress
from lorax_flax.train.config import Durations
from lorax_flax.train.evaluate import Evaluation
from lorax_flax.train.logs.writer import Record, SilentRecord
from lorax_flax.train.metrics import METRICS, Mean
from lorax_flax.train.objective import Objective

log = logging.getLogger(__name__)

# Steps in a row that may be skipped, where a run does not stop at the first.
_MOST_SKIPPED = 50
# Characters of a prompt's end, and of its answer, that are logged.
_SHOWN = 60


class Diverged(LoraxError):
  """A loss, a gradient or an evaluation that is not finite has ended the run.

  Attributes:
    step: the step that was not finite, or before the evaluation that was not.
    reason: a few words.
  """

  def __init__(self, step: int, reason: str, kept: str = ""):
    super().__init__(
      f"{reason}: training has diverged. A lower train.learning_rate or "
      f"train.grad_clip may help{kept}"
    )
    self.step, self.reason = step, reason


class History:
  """The metrics of one run, on the host.

  Attributes:
    record: writer of the lines.
    name: of the run, which prefixes its log lines; empty where there is only one.
    tokens: number of units so far, of the throughput.
    skipped: number of steps that changed nothing, since they were not finite.
    failed: step and reason of a run that diverged, else None.
    scores: [step, score] of each time that it was judged.
    pruned: step and reason of a run that was stopped early, else None.
  """

  def __init__(
    self,
    record: Record | SilentRecord,
    plan: Durations,
    objective: Objective,
    on_nonfinite: str,
    progress: Progress,
    name: str = "",
  ):
    self.record, self.name = record, name
    self._plan, self._on_nonfinite = plan, on_nonfinite
    self._primary, self._unit = objective.primary, objective.throughput.unit
    self._pending = {name: Mean(*pair) for name, pair in progress.pending.items()}
    self._evaluations = list(progress.evaluations)
    self._best = progress.best
    self._skipped_in_a_row = 0
    self.tokens, self.skipped = progress.tokens, progress.skipped
    self.failed, self.pruned = progress.failed, progress.pruned
    self.scores = list(progress.scores)

  def add(self, number: int, metrics: Mapping[str, Mean]) -> None:
    """Adds a step's metrics, which are on the host already; one may be skipped.

    The first step that is not finite and may not be skipped ends the run, and so does
    the last one where all were skipped: sets `failed`.
    """
    if self.failed is not None:
      return
    found = {name: mean.on_host() for name, mean in metrics.items()}
    wrong = {n: m.total for n, m in found.items() if not math.isfinite(m.total)}
    if not wrong:
      self._skipped_in_a_row = 0
      for name, new in found.items():
        self._pending[name] = self._pending.get(name, Mean(0.0, 0.0)) + new
      return
    name = "loss" if "loss" in wrong else next(iter(wrong))
    reason = f"{name} is {wrong[name]} at step {number}"
    if self._on_nonfinite == "stop":
      self.fail(number, reason)
      return
    self.skipped += 1
    self._skipped_in_a_row += 1
    nothing_learnt = self.skipped == self._plan.total
    if self._skipped_in_a_row < _MOST_SKIPPED and not nothing_learnt:
      self.info("%s: the step is skipped", reason)
      return
    steps = f"all {self.skipped}" if nothing_learnt else f"{_MOST_SKIPPED}"
    row = f"{steps} steps in a row were not finite and changed nothing"
    self.fail(number, f"{row}. {reason}")

  def fail(self, number: int, reason: str) -> None:
    """Ends the run: what it would write from here on is not what it is asked for."""
    self.failed = {"step": number, "reason": reason}
    if self.name:
      self.info("%s: it ends here, the others go on", reason)

  def prune(self, number: int, reason: str) -> None:
    """Ends the run, which does worse than others."""
    self.pruned = {"step": number, "reason": reason}
    self.info("step %d: %s", number, reason)

  def info(self, message: str, *values: object) -> None:
    """Logs a line about the run, with its name where there are several."""
    prefix = f"{self.name}  ".replace("%", "%%") if self.name else ""
    log.info(prefix + message, *values)

  def log(self, number: int) -> dict[str, float] | None:
    """Writes the means since the last line, and returns them; None: there are none."""
    if not self._pending:
      return None  # All steps since the last line were skipped.
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
    metrics = found.named()
    self._evaluations.append(
      {"step": number, "epoch": epoch, "metrics": metrics, "examples": found.examples}
    )
    primary = self._primary
    improved = self._best is None or METRICS[primary].better(
      metrics[primary], self.best_and_last()[0]["metrics"][primary]
    )
    if improved:
      if self._best is not None:
        self._evaluations[self._best].pop("report", None)  # Large, of many classes.
      if found.report is not None:
        self._evaluations[-1]["report"] = found.report
      self._best = len(self._evaluations) - 1
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    self.info("epoch %.2f  %s examples  %s", epoch, f"{found.examples:,}", shown)
    return improved

  def answered(self, lines: Sequence[dict[str, Any]]) -> None:
    """Writes answers; see `Samples.lines`."""
    self.record.answered(lines)
    for line in lines:
      prompt, answer = (" ".join(line[name].split()) for name in ("prompt", "answer"))
      step, shown = line["step"], (prompt[-_SHOWN:], answer[:_SHOWN])
      self.info("step %d  %s → %s", step, *shown)

  def best_and_last(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best evaluation (the first of equals), and the last one.

    The end of a run that evaluates nothing takes the place of both.
    """
    if self._best is None:
      total, epoch = self._plan.total, self._plan.total / self._plan.epoch
      last = {"step": total, "epoch": epoch, "metrics": {}, "examples": 0}
      return last, last
    return self._evaluations[self._best], self._evaluations[-1]

  def progress(
    self, position: Mapping[str, Any], seconds: Mapping[str, float], **where: Any
  ) -> Progress:
    """The part of a checkpoint that describes this run; arguments are its fields."""
    pending = self._pending.items()
    return Progress(
      position=dict(position),
      pending={name: (float(m.total), float(m.count)) for name, m in pending},
      evaluations=self._evaluations,
      best=self._best,
      seconds=dict(seconds),
      tokens=self.tokens,
      skipped=self.skipped,
      failed=self.failed,
      scores=self.scores,
      pruned=self.pruned,
      **where,
    )

  def result(
    self, trained_parameters: int, seconds: Mapping[str, float]
  ) -> dict[str, Any]:
    """The content of result.json, except for the paths of what was written."""
    best, last = self.best_and_last()
    speed = self.tokens / seconds["steps"] if seconds["steps"] else 0.0
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
      self._unit: self.tokens,
      f"{self._unit}_per_second": speed,
      **({"report": best["report"]} if "report" in best else {}),
    }
