"""Trains some trials of a sweep in this process: one alone, several together."""

from pathlib import Path

from experiments.run import train
from experiments.sweeps import outcomes
from experiments.sweeps.trials import Pack
from lorax_flax.distributed import processes
from lorax_flax.files import workdir as files
from lorax_flax.train.logs.history import Diverged


def run(pack: Pack, folder: Path) -> None:
  """Trains the trials of a pack; each one's folder records how it ended.

  Args:
    folder: of the sweep.

  Raises:
    LoraxError: what `experiments.run` raises, but for a trial that diverges.
    processes.Preempted: SIGTERM asked for it; all is saved.
  """
  over = all(outcome.over for outcome in outcomes.read(pack.trials, folder))
  if processes.broadcast(over):
    return
  runs = {folder / trial.name: trial.settings for trial in pack.trials}
  for own, settings in runs.items():
    files.check(own, settings.to_json())
  shared = folder / pack.name if len(runs) > 1 else next(iter(runs))
  results = train(runs, shared)
  if processes.first():
    for own, result in zip(runs, results, strict=True):
      if isinstance(result, Diverged):
        outcomes.write_failed(own, result)
