"""What a sweep is to do: the trials that a config lists, or the search it asks for."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.sweeps import search, trials
from experiments.sweeps.outcomes import Outcome
from experiments.sweeps.trials import Trial
from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket
from lorax_flax.files import workdir as files
from lorax_flax.jobs import settings

_TRIALS = "trials.json"


@dataclass(frozen=True)
class Plan:
  """A sweep or a search.

  Attributes:
    title: of its table.
    config: what all trials have in common.
    overridden: fields that were given on the command line.
    changes: of a sweep, what each trial sets.
    space: of a search, what it chooses from.
  """

  title: str
  config: ConfigDict
  overridden: Collection[str]
  changes: Sequence[Mapping[str, Any]]
  space: search.Space | None

  def to_json(self) -> dict[str, Any]:
    """For the folder's config.json."""
    base = settings.convert(self.config, self.overridden).to_json()
    if self.space is not None:
      return {"base": base, "search": self.space.to_json()}
    named = {f"trial-{i:03}": dict(own) for i, own in enumerate(self.changes)}
    return {"base": base, "sweep": named}

  def make(self, changes: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Trials that set these."""
    return trials.make(self.config, changes, self.overridden)

  def listed(self) -> list[Trial]:
    """All trials that are known before any has run; a search's first.

    Raises:
      LoraxError: Optuna, which a search needs, is not installed.
    """
    return self.make(self.changes if self.space is None else self._ask([]))

  def next(self, folder: Path, outcomes: Sequence[Outcome]) -> list[Trial]:
    """All trials so far: those that have been chosen, and where all are over, more.

    Args:
      folder: of the sweep, which keeps what was chosen.
      outcomes: of those that were chosen before.
    """
    chosen = self.chosen(folder)
    over = all(outcome.over for outcome in outcomes)
    if self.space is not None and over and len(chosen) == len(outcomes):
      chosen = [*chosen, *self._ask(outcomes)]
      files.write_text(folder / _TRIALS, json.dumps(chosen, indent=1) + "\n")
    return self.make(chosen)

  def batches(self, known: Sequence[Trial]) -> list[Sequence[Trial]]:
    """Trials that were chosen at the same time, and may train together."""
    size = len(known) if self.space is None else self.space.at_once
    return [known[i : i + size] for i in range(0, len(known), size)]

  def chosen(self, folder: Path) -> Sequence[Mapping[str, Any]]:
    """What the trials set that there are so far."""
    file = folder / _TRIALS
    if self.space is None:
      return self.changes
    with bucket.reaching(file):
      return json.loads(file.read_text("utf-8")) if file.exists() else []

  def _ask(self, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    assert self.space is not None
    return search.ask(self.space, self.config.seed, outcomes)


def of(spec: str, config: ConfigDict, overridden: Collection[str]) -> Plan:
  """The plan of the config that `spec` names.

  Raises:
    LoraxError: its file has neither sweep(add) nor search(space), or both; a field or a
      value that can't be, two trials that are the same.
  """
  changes, space = trials.listed(spec), search.space(spec)
  if (changes is None) == (space is None):
    what = "neither" if space is None else "both, and one is wanted:"
    raise LoraxError(
      f"{spec} has {what} a function sweep(add), which lists trials, "
      f"{'nor' if space is None else 'or'} search(space), which gives bounds"
    )
  plan = Plan(spec, config, overridden, changes or (), space)
  plan.make(changes if space is None else [space.first()])  # type: ignore[arg-type]
  return plan
