"""The plan of a sweep: the trials that a config lists, or a search within bounds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cli.config_flag import Chosen
from experiments.sweeps import pruning, search, trials
from experiments.sweeps.outcomes import Outcome
from experiments.sweeps.pruning import Pruning
from experiments.sweeps.trials import Pack, Trial
from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket
from lorax_flax.files import workdir as files

_TRIALS = "trials.json"


@dataclass(frozen=True)
class Plan:
  """A sweep or a search.

  Attributes:
    config: the command line's, which all trials have in common.
    changes: values that each trial of a sweep sets.
    space: bounds of a search; None for a sweep.
    pruning: rule by which trials are stopped early; None: none is.
  """

  config: Chosen
  changes: Sequence[Mapping[str, Any]]
  space: search.Space | None
  pruning: Pruning | None = None

  def to_json(self) -> dict[str, Any]:
    """Content of the folder's config.json."""
    found: dict[str, Any] = {"base": self.config.settings().to_json()}
    if self.pruning is not None:
      found["prune"] = self.pruning.to_json()
    if self.space is not None:
      return found | {"search": self.space.to_json()}
    named = {f"trial-{i:03}": dict(own) for i, own in enumerate(self.changes)}
    return found | {"sweep": named}

  def make(self, changes: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Trials that set these."""
    return trials.make(self.config.values, changes, self.config.overridden)

  def listed(self) -> list[Trial]:
    """Trials that are known before any has run; a search's first.

    Raises:
      LoraxError: Optuna, which a search needs, is not installed.
    """
    return self.make(self.changes if self.space is None else self._ask([]))

  def next(self, folder: Path, outcomes: Sequence[Outcome]) -> list[Trial]:
    """Trials so far: those that have been chosen, and where all are over, more.

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

  def packs(self, known: Sequence[Trial], at_once: int) -> list[Pack]:
    """Programs: trials that train together, or take turns where some are pruned."""
    return [
      pack
      for batch in self.batches(known)
      for pack in trials.packs(batch, at_once if self.pruning is None else len(batch))
    ]

  def before(self, known: Sequence[Trial], pack: Pack) -> list[Trial]:
    """Trials that were over when those of a pack were chosen."""
    found: list[Trial] = []
    for batch in self.batches(known):
      if pack.trials[0].number in [trial.number for trial in batch]:
        break
      found += batch
    return found

  def chosen(self, folder: Path) -> Sequence[Mapping[str, Any]]:
    """Changes of the trials that there are so far."""
    file = folder / _TRIALS
    if self.space is None:
      return self.changes
    with bucket.reaching(file):
      return json.loads(file.read_text("utf-8")) if file.exists() else []

  def _ask(self, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    assert self.space is not None
    return search.ask(self.space, self.config.values["seed"], outcomes)


def of(config: Chosen, prune: str | None = None) -> Plan:
  """The plan of a config.

  Args:
    prune: the content of --prune.

  Raises:
    LoraxError: its file has neither sweep(add) nor search(space), or both; a field or a
      value that can't be, two trials that are the same; what `pruning.read` raises, or
      trials that can't take turns.
  """
  spec = config.spec
  changes, space = trials.listed(spec), search.space(spec)
  if (changes is None) == (space is None):
    which = "neither" if space is None else "both, and needs one:"
    raise LoraxError(
      f"{spec} has {which} a function sweep(add), which lists trials, "
      f"{'nor' if space is None else 'or'} search(space), which gives bounds"
    )
  plan = Plan(config, changes or (), space, pruning.read(prune))
  made = plan.make(changes if space is None else [space.first()])  # type: ignore[arg-type]
  if plan.pruning is not None:
    trials.check_turns(made)
  return plan
