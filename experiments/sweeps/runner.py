"""Runs a sweep: its packs, here or in processes of their own, and its table."""

import functools
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import run as experiment
from experiments.cli import training
from experiments.sweeps import outcomes, pruning, trials
from experiments.sweeps import page as sweep_page
from experiments.sweeps import table as sweep_table
from experiments.sweeps.outcomes import Outcome
from experiments.sweeps.plan import Plan
from experiments.sweeps.trials import Pack, Trial
from lorax_flax.distributed import processes, subprocesses
from lorax_flax.errors import LoraxError
from lorax_flax.files import workdir as files
from lorax_flax.train.judging import Standing

PAGE = "results.html"
log = logging.getLogger("lorax_flax.sweep")


def run(
  plan: Plan, folder: Path, at_once: int, jobs: int, arguments: Sequence[str]
) -> int:
  """Runs all that is left to run; returns the exit code.

  Args:
    folder: of the sweep.
    at_once: largest number of trials that train together.
    jobs: number of processes that run at a time.
    arguments: this command's, for those processes.

  Raises:
    LoraxError: the folder holds another sweep.
  """
  claim(plan, folder)
  ends: list[Outcome] = []
  reasons: dict[str, str] = {}
  code = 0
  while True:
    known = plan.next(folder, ends)
    ends = outcomes.read(known, folder)
    left = left_of(plan, known, folder, at_once)
    if not left:
      break
    done = sum(end.over for end in ends)
    print(f"{len(known)} trials, {done} of them over; {len(left)} programs to run")
    # A search may need other processes later, for which this one must leave the
    # devices alone.
    if len(left) == 1 and plan.space is None:
      code = _here(plan, known, left[0], folder, at_once)
    else:
      code, reasons = _elsewhere(left, folder, jobs, arguments)
    ends = outcomes.read(known, folder)
    if not all(end.over for end in ends):
      break
  report(plan, folder, ends)
  for name, reason in reasons.items():
    print(f"{name} could not be run: {reason}", file=sys.stderr)
  if code == 0 and not any(end.result is not None for end in ends):
    return 1
  return code


def claim(plan: Plan, folder: Path) -> None:
  """Claims the folder for this sweep, or resumes the sweep that it holds.

  Raises:
    LoraxError: it holds another one.
  """
  print(f"Workdir: {folder}", flush=True)
  files.check(folder, plan.to_json())
  files.check_writable(folder)
  files.claim(folder, plan.to_json())


def left_of(
  plan: Plan, known: Sequence[Trial], folder: Path, at_once: int
) -> list[Pack]:
  """Packs of which a trial is not over."""
  packs = plan.packs(known, at_once)
  return [pack for pack in packs if not _over(pack, folder)]


def table(plan: Plan, folder: Path) -> int:
  """Makes the table of what is over; returns the exit code.

  Raises:
    LoraxError: the folder holds another sweep, or none.
  """
  files.check(folder, plan.to_json())
  ends = outcomes.read(plan.make(plan.chosen(folder)), folder)
  if not any(end.over for end in ends):
    raise LoraxError(f"no trial in {folder} is over yet")
  report(plan, folder, ends)
  return 0


def train(plan: Plan, folder: Path, numbers: Sequence[int], at_once: int = 8) -> int:
  """Trains these trials together in this process; returns the exit code.

  Args:
    at_once: number of trials at the same time where they are pruned; else all are.
  """
  files.check(folder, plan.to_json())
  known = plan.make(plan.chosen(folder))
  chosen = [trial for trial in known if trial.number in numbers]
  if len(chosen) < len(set(numbers)):
    raise LoraxError(f"--trials: there are trials 0 to {len(known) - 1}")
  found = trials.packs(chosen, len(chosen))
  if len(found) > 1:
    raise LoraxError(f"--trials: they can't train together: {found[1].why}")
  return _here(plan, known, found[0], folder, at_once)


def _here(
  plan: Plan, known: Sequence[Trial], pack: Pack, folder: Path, at_once: int
) -> int:
  return training.supervise(lambda: train_pack(plan, known, pack, folder, at_once))


def train_pack(
  plan: Plan, known: Sequence[Trial], pack: Pack, folder: Path, at_once: int
) -> None:
  """Trains the trials of a pack; each one's folder records how it ended.

  Args:
    known: all trials of the sweep so far.

  Raises:
    LoraxError: what `experiments.run` raises, but for a trial that diverges.
    processes.Preempted: SIGTERM asked for it; all is saved.
  """
  if processes.broadcast(_over(pack, folder)):
    return
  runs = {folder / trial.name: trial.settings for trial in pack.trials}
  for own, settings in runs.items():
    files.check(own, settings.to_json())
  shared = folder / pack.name if len(runs) > 1 else next(iter(runs))

  def watch(standings: Sequence[Standing]) -> None:
    try:
      for own, standing in zip(runs, standings, strict=True):
        outcomes.write(own, standing)
      ends = outcomes.read(known, folder)
      files.write_text(folder / PAGE, sweep_page.page(ends, plan.config.spec, folder))
    except OSError as error:  # A page is no reason to stop a sweep.
      log.warning("%s: %s", PAGE, error)

  turns: dict[str, Any] = {"watch": watch}
  if plan.pruning is not None:
    before = outcomes.read(plan.before(known, pack), folder)
    standings = [end.standing for end in before]
    turns["judge"] = functools.partial(pruning.judge, plan.pruning, standings)
    turns["places"] = at_once
  experiment.train(runs, shared, **turns)


def _over(pack: Pack, folder: Path) -> bool:
  return all(end.over for end in outcomes.read(pack.trials, folder))


def _elsewhere(
  packs: Sequence[Pack], folder: Path, jobs: int, arguments: Sequence[str]
) -> tuple[int, dict[str, str]]:
  """Runs packs in processes of their own.

  Returns:
    The exit code of all, and of each pack that could not be run the reason.
  """
  commands = {
    str(pack): [sys.executable, *command(pack, folder, arguments)] for pack in packs
  }
  # One stream, so that an error is the last line.
  ended = subprocesses.run(commands, jobs, stderr=subprocess.STDOUT)
  codes = [end.code for end in ended.values()]
  reasons = {
    name: end.last_line or f"exit code {end.code}"
    for name, end in ended.items()
    if end.code not in (0, processes.PREEMPTED)
  }
  stopped = processes.PREEMPTED in codes or len(ended) < len(packs)
  return processes.PREEMPTED if stopped else max(map(abs, codes)), reasons


def command(pack: Pack, folder: Path, arguments: Sequence[str]) -> list[str]:
  """Python's arguments that train a pack, from those of the sweep's command."""
  numbers = ",".join(str(trial.number) for trial in pack.trials)
  own = [f"--workdir={folder}", f"--trials={numbers}"]
  return ["-m", "experiments.sweep", *arguments, *own]


def report(plan: Plan, folder: Path, ends: Sequence[Outcome]) -> None:
  """Writes results.csv and results.html, and prints the table and where they are."""
  files.write_text(folder / "results.csv", sweep_table.to_csv(ends))
  files.write_text(folder / PAGE, sweep_page.page(ends, plan.config.spec, folder))

  for text in (sweep_table.to_text(ends), sweep_table.medians_to_text(ends)):
    if text is not None:
      print(text, end="\n\n")
  for name in ("results.csv", PAGE):
    print(folder / name)
