"""Trains some trials of a sweep in this process: one alone, several together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps import outcomes
from experiments.sweeps.trials import Pack
from lorax_flax.distributed import processes
from lorax_flax.files import workdir as files
from lorax_flax.jobs import build as job
from lorax_flax.jobs import claim
from lorax_flax.train import loop
from lorax_flax.train import trials as together
from lorax_flax.train.logs.history import Diverged


def run(unit: Pack, folder: Path) -> None:
  """Trains what is left of a unit's trials; each one's folder says how it ended.

  Args:
    folder: of the sweep.

  Raises:
    LoraxError: what `experiments.run` raises, but for a trial that diverges.
    processes.Preempted: SIGTERM asked for it; all is saved.
  """
  over = all(outcome.over for outcome in outcomes.read(unit.trials, folder))
  if processes.broadcast(over):
    return
  folders = [folder / trial.name for trial in unit.trials]
  for own, trial in zip(folders, unit.trials, strict=True):
    files.check(own, trial.settings.to_json())
  if len(folders) == 1:
    results = [_alone(unit, folders[0])]
  else:
    results = _together(unit, folders, folder / unit.name)
  if processes.first():
    for own, result in zip(folders, results, strict=True):
      if isinstance(result, Diverged):
        outcomes.write_failed(own, result)


def _alone(unit: Pack, folder: Path) -> Any:
  wanted = unit.trials[0].settings
  prepared = claim.prepare({folder: wanted}, lambda say: job.prepare(wanted, say))
  try:
    return loop.fit(wanted.train, prepared, folder)
  except Diverged as error:
    return error


def _together(unit: Pack, folders: Sequence[Path], shared: Path) -> list[Any]:
  """`shared` is the folder of what the trials have in common."""
  wanted = [trial.settings for trial in unit.trials]
  jobs, batches = claim.prepare(
    dict(zip(folders, wanted, strict=True)),
    lambda say: job.prepare_several(wanted, say),
  )
  trials = [
    together.Trial(trial.name, trial.settings.train, own, folder)
    for trial, own, folder in zip(unit.trials, jobs, folders, strict=True)
  ]
  return together.fit(trials, batches, shared)
