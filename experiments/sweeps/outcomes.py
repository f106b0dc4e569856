"""Outcomes of a sweep's trials, read from their folders."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experiments.sweeps.trials import Trial
from lorax_flax.files import bucket
from lorax_flax.files import workdir as files
from lorax_flax.train.logs.history import Diverged
from lorax_flax.train.metrics import METRICS

FAILED = "failed.json"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
  """A trial, and how it ended.

  Attributes:
    result: content of result.json; None unless the trial is done.
    failed: step and reason of a trial that ended early; None for others.
  """

  trial: Trial
  result: dict[str, Any] | None
  failed: dict[str, Any] | None

  @property
  def over(self) -> bool:
    """True where there is nothing left to do."""
    return self.result is not None or self.failed is not None

  @property
  def metrics(self) -> dict[str, float]:
    """Metrics of the best evaluation."""
    # They come before the rest in result.json.
    named = (self.result or {}).items()
    return dict(itertools.takewhile(lambda item: item[0] != "primary_metric", named))

  @property
  def primary(self) -> str | None:
    """The name of the metric that counts."""
    return None if self.result is None else self.result["primary_metric"]

  @property
  def score(self) -> float | None:
    """Its value."""
    return None if self.result is None else self.result[self.result["primary_metric"]]


def read(trials: Sequence[Trial], folder: Path) -> list[Outcome]:
  """Outcomes of the trials of a sweep's folder."""
  return [_read(trial, folder / trial.name) for trial in trials]


def _read(trial: Trial, folder: Path) -> Outcome:
  failed = folder / FAILED
  with bucket.reaching(failed):
    why = files.read_json(failed) if failed.exists() else None
  return Outcome(trial, files.result(folder), why)


def write_failed(folder: Path, error: Diverged) -> None:
  """Writes down that the trial of this folder ended before its time."""
  files.write_json(folder / FAILED, {"step": error.step, "reason": error.reason})


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
  """The first of those with the best score; None where none is done."""
  return leader(outcomes, lambda outcome: outcome.score, primary(outcomes))


def primary(outcomes: Sequence[Outcome]) -> str:
  """The name of the metric that counts; "score" where no trial is done."""
  return next((o.primary for o in outcomes if o.primary is not None), "score")


def leader(
  items: Sequence[Item], score: Callable[[Item], float | None], primary: str
) -> Item | None:
  """The first of the items with the best score, by a metric's direction."""
  found: tuple[Item, float] | None = None
  for item in items:
    value = score(item)
    if value is None:
      continue
    if found is None or METRICS[primary].better(value, found[1]):
      found = item, value
  return None if found is None else found[0]
