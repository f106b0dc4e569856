"""Trains some trials of a sweep in this process: one alone, several together."""

from pathlib import Path

from experiments import compile_cache, job, outcomes
from experiments.trials import Unit
from lorax_flax.train import loop, processes, together
from lorax_flax.train import workdir as files
from lorax_flax.train.ledger import Diverged


def run(unit: Unit, folder: Path) -> None:
  """Trains what is left of a unit's trials; each one's folder says how it ended.

  Args:
    folder: of the sweep.

  Raises:
    LoraxError: what `experiments.run` raises, but for a trial that diverges.
    processes.Preempted: SIGTERM asked for it; all is saved.
  """
  over = all(outcome.over for outcome in outcomes.read(unit.trials, folder))
  if processes.first_says(over):
    return
  folders = [folder / trial.name for trial in unit.trials]
  for own, trial in zip(folders, unit.trials, strict=True):
    files.check(own, trial.settings.to_json())
    if processes.first():
      files.check_writable(own)
  compile_cache.use(unit.trials[0].settings.compilation_cache)
  say = print if processes.first() else _nothing
  jobs, batches = job.prepare_several([t.settings for t in unit.trials], say)
  if processes.first():
    for own, trial in zip(folders, unit.trials, strict=True):
      files.claim(own, trial.settings.to_json())
  processes.meet("the workdirs are claimed")
  configs = [trial.settings.train for trial in unit.trials]
  if len(jobs) == 1:
    try:
      loop.fit(configs[0], jobs[0], folders[0])
    except Diverged as error:
      results: list = [error]
    else:
      results = [None]
  else:
    parts = zip([t.name for t in unit.trials], configs, jobs, folders, strict=True)
    trials = [together.Trial(*part) for part in parts]
    results = together.fit(trials, batches, folder / unit.name)
  if processes.first():
    for own, result in zip(folders, results, strict=True):
      if isinstance(result, Diverged):
        outcomes.write_failed(own, result)


def _nothing(line: str) -> None:
  """The first process says it."""
