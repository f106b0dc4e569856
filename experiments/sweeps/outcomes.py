"""Outcomes of a sweep's trials, read from their folders."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from experiments.sweeps.trials import Trial
from lorax_flax.files import bucket
from lorax_flax.files import workdir as files
from lorax_flax.train.judging import Standing
from lorax_flax.train.metrics import METRICS

FAILED = "failed.json"
JUDGED = "judged.json"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
  """A trial, and how it ended.

  Attributes:
    result: content of result.json; None unless the trial is done.
    failed: step and reason of a trial that diverged; None for others.
    pruned: step and reason of a trial that was stopped early; None for others.
    scores: by step, wherever it was judged; on a sample of the held-out examples.
  """

  trial: Trial
  result: dict[str, Any] | None
  failed: dict[str, Any] | None
  pruned: dict[str, Any] | None = None
  scores: Mapping[int, float] = field(default_factory=dict)

  @property
  def over(self) -> bool:
    """True where there is nothing left to do."""
    return any(x is not None for x in (self.result, self.failed, self.pruned))

  @property
  def standing(self) -> Standing:
    """Its standing for the judge of later trials."""
    return Standing(self.scores, self.pruned, self.failed, self.result is not None)

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
  failed, judged = (_json(folder / name) for name in (FAILED, JUDGED))
  found = judged or {"pruned": None, "scores": []}
  scores = dict(found["scores"])
  return Outcome(trial, files.result(folder), failed, found["pruned"], scores)


def _json(file: Path) -> dict[str, Any] | None:
  with bucket.reaching(file):
    return files.read_json(file) if file.exists() else None


def write(folder: Path, standing: Standing) -> None:
  """Writes down how the trial of this folder was judged, and that it diverged."""
  judged = {"pruned": standing.pruned, "scores": [*map(list, standing.scores.items())]}
  for name, there, value in (
    (FAILED, standing.failed, standing.failed),
    (JUDGED, standing.scores, judged),
  ):
    if there and _json(folder / name) != value:
      files.write_json(folder / name, value)


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
