"""The table of a sweep: a line for each trial, and medians over its seeds."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.sweeps import outcomes as ends
from experiments.sweeps.outcomes import Outcome
from experiments.sweeps.trials import show
from lorax_flax import text_table

# The field that differs within a group over which a median is taken.
_SEED = "seed"


@dataclass(frozen=True)
class Median:
  """Scores of the same settings under several seeds.

  Attributes:
    changes: values that they have in common.
    median, spread: of their scores; the spread is the standard deviation of a sample,
      0 of one score.
    done, count: trials that are done, and all.
  """

  changes: dict[str, Any]
  median: float | None
  spread: float | None
  done: int
  count: int

  @property
  def cells(self) -> tuple[Any, ...]:
    """Median, spread and number of seeds; "" for a number that is not there."""
    numbers = ("" if x is None else x for x in (self.median, self.spread))
    return (*numbers, f"{self.done} of {self.count}")


def fields(outcomes: Sequence[Outcome]) -> list[str]:
  """The fields that trials differ in, in the order in which they are first set."""
  return list(outcomes[0].trial.fields)


def medians(outcomes: Sequence[Outcome]) -> list[Median]:
  """Medians over the seeds of each setting; a trial that failed has no score."""
  groups: dict[str, list[Outcome]] = {}
  for outcome in outcomes:
    groups.setdefault(_setting(_changes(outcome)), []).append(outcome)
  found = []
  for group in groups.values():
    scores = [outcome.score for outcome in group if outcome.score is not None]
    median = statistics.median(scores) if scores else None
    spread = None
    if scores:
      spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    found.append(Median(_changes(group[0]), median, spread, len(scores), len(group)))
  return found


def _changes(outcome: Outcome) -> dict[str, Any]:
  """Fields that trials differ in, but for the seed."""
  return {name: x for name, x in outcome.trial.fields.items() if name != _SEED}


def _setting(changes: Mapping[str, Any]) -> str:
  """Key of a setting, the same for all its seeds."""
  return repr(sorted(changes.items()))


def best_median(outcomes: Sequence[Outcome]) -> Median | None:
  """The setting with the best median; None where no trial is done."""
  return ends.leader(
    medians(outcomes), lambda median: median.median, ends.primary(outcomes)
  )


def status(outcome: Outcome) -> str:
  """Outcome in words: "done", "not run", "failed at step 3", "pruned at step 9"."""
  for verb, ended in (("failed", outcome.failed), ("pruned", outcome.pruned)):
    if ended is not None:
      return f"{verb} at step {ended['step']}"
  return "done" if outcome.result is not None else "not run"


def rows(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[Any]]]:
  """Header and lines. Nothing in them depends on the clock."""
  named = fields(outcomes)
  measured = list(dict.fromkeys(name for o in outcomes for name in o.metrics))
  primary = ends.primary(outcomes)
  measured.sort(key=lambda name: name != primary)
  by_setting = {_setting(m.changes): m for m in medians(outcomes)}
  header = ["trial", *named, "status", *measured]
  header += ["best_step", "trained_parameters", "median", "spread", "seeds", "reason"]
  lines = []
  for outcome in outcomes:
    of_all, result = by_setting[_setting(_changes(outcome))], outcome.result or {}
    lines.append(
      [
        outcome.trial.name,
        *(outcome.trial.fields[name] for name in named),
        status(outcome),
        *(outcome.metrics.get(name, "") for name in measured),
        result.get("best_step", ""),
        result.get("trained_parameters", ""),
        *of_all.cells,
        (outcome.failed or outcome.pruned or {}).get("reason", ""),
      ]
    )
  return header, lines


def to_csv(outcomes: Sequence[Outcome]) -> str:
  """The full table as CSV, numbers in full."""
  header, lines = rows(outcomes)
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerows([header, *lines])
  return out.getvalue()


def to_text(outcomes: Sequence[Outcome]) -> str:
  """The table for a terminal; the best trial is marked."""
  named = fields(outcomes)
  header = ("trial", *map(_short, named), ends.primary(outcomes), "best step", "")
  best = ends.best(outcomes)
  lines = []
  for outcome in outcomes:
    score, result = outcome.score, outcome.result or {}
    lines.append(
      (
        outcome.trial.name,
        *(show(outcome.trial.fields[name]) for name in named),
        "" if score is None else f"{score:.4f}",
        result.get("best_step", ""),
        "best" if outcome is best else "" if result else status(outcome),
      )
    )
  align = f"l{'r' * len(named)}rrl"
  return text_table.render(header, lines, align=align, title="Trials")


def medians_to_text(outcomes: Sequence[Outcome]) -> str | None:
  """The medians for a terminal; None where no setting has several seeds."""
  found = medians(outcomes)
  if all(median.count == 1 for median in found):
    return None
  named, best = list(found[0].changes), best_median(outcomes)
  lines = [
    (
      *map(show, median.changes.values()),
      *(x if isinstance(x, str) else f"{x:.4f}" for x in median.cells),
      "best" if median == best else "",
    )
    for median in found
  ]
  header = (*map(_short, named), "median", "±", "seeds", "")
  align = f"{'r' * len(named)}rrrl"
  return text_table.render(header, lines, align=align, title="Medians over seeds")


def _short(name: str) -> str:
  """A field's name without its section, for a narrow terminal."""
  return name.rpartition(".")[2]
