"""Trains the trials of a config's sweep, together where they can, and makes one table.

  python -m experiments.sweep --config=quickstart.py --workdir=DIR
  python -m experiments.sweep --config=quickstart.py --list
  python -m experiments.sweep --config=quickstart.py --config.train.steps=30 …

The config's file lists them in a function beside get_config:

  def sweep(add):
    for rate in (1e-3, 3e-3):
      for seed in range(3):
        add(**{"train.learning_rate": rate, "seed": seed})

or gives bounds, within which Optuna chooses (see experiments/sweeps/search.py):

  def search(space):
    space.log_uniform("train.learning_rate", 1e-4, 1e-2)
    space.trials(24, at_once=8)

Trials that differ in nothing but the learning rate, weight decay, clipping, rank, alpha
and seed train together: one program, one copy of the base. The others run one after
another, --jobs=N at a time. DIR then holds results.csv, results.html, and of each trial
a folder as experiments.run leaves it: trial-000/ with result.json, metrics.jsonl,
adapter/, … A trial that diverges does not stop the others. The same command goes on
with a sweep that was interrupted. --config.NAME=VALUE is for all trials.

--prune=halving (or median) judges trials while they train, stops those that do worse
than others, and gives their places in the program to waiting ones, so that --at_once
trials train until none is left (see experiments/sweeps/pruning.py; extra `sweep`). A
trial that is not stopped is what it is without pruning. results.html grows meanwhile.

`python -m launch.sweep` hands each program to a job of its own, on a cluster or a pod
slice; --table then makes the table.
"""

from experiments.cli import collector, large_pages

if __name__ == "__main__":
  large_pages.restart()  # First, or all that is imported would be imported twice.
  collector.seldom()

import os
import sys
from collections.abc import Sequence

from absl import flags

from experiments.cli import command as cli
from experiments.cli import config_flag, run_flags
from experiments.sweeps.trials import Pack
from lorax_flax import text_table
from lorax_flax.errors import LoraxError, listing

FLAGS = flags.FlagValues()
config_flag.define(FLAGS)
WORKDIR = run_flags.workdir(FLAGS, "runs/CONFIG-sweep")
LIST = flags.DEFINE_bool(
  "list",
  False,
  "Print the trials, which train together and why, and run nothing.",
  flag_values=FLAGS,
)
AT_ONCE = run_flags.at_once(FLAGS)
PRUNE = run_flags.prune(FLAGS)
JOBS = flags.DEFINE_integer(
  "jobs",
  1,
  "Number of processes at a time, for trials that do not train together.",
  lower_bound=1,
  flag_values=FLAGS,
)
LAUNCH = flags.DEFINE_string(
  "launch", None, "Moved to `python -m launch.sweep`.", flag_values=FLAGS
)
TABLE = flags.DEFINE_bool(
  "table",
  False,
  "Make the table of the trials that are over, and run nothing.",
  flag_values=FLAGS,
)
TRIALS = flags.DEFINE_list(
  "trials",
  None,
  "Train only these, by number, together, and make no table: the command of each "
  "process that a sweep starts.",
  flag_values=FLAGS,
)
DISTRIBUTED = run_flags.distributed(FLAGS)


def main() -> int:
  if LAUNCH.value is not None:
    raise LoraxError(
      "--launch is a command of its own now: python -m launch.sweep --config=… "
      f"--workdir=… -- {LAUNCH.value}"
    )
  config = config_flag.read(FLAGS)
  from experiments.sweeps import plan

  found = plan.of(config, PRUNE.value)
  if LIST.value:
    _list(found.packs(found.listed(), AT_ONCE.value))
    return 0
  from experiments.sweeps import runner
  from lorax_flax.distributed import processes
  from lorax_flax.files import bucket, lock

  usual = f"{config_flag.default_workdir(config.spec)}-sweep"
  folder = bucket.folder(WORKDIR.value or usual)
  if TRIALS.value is not None:
    processes.initialize(DISTRIBUTED.value)
    return runner.train(found, folder, _numbers(TRIALS.value), AT_ONCE.value)
  if DISTRIBUTED.value or processes.COORDINATOR in os.environ:
    raise LoraxError(
      "several processes train some trials together, and do not run a sweep: name "
      "the trials, --trials=0,1,2"
    )
  if TABLE.value:
    return runner.table(found, folder)
  with lock.held(folder):
    return runner.run(found, folder, AT_ONCE.value, JOBS.value, sys.argv[1:])


def _numbers(texts: Sequence[str]) -> list[int]:
  if wrong := [text for text in texts if not text.isdecimal()]:
    raise LoraxError(f"--trials takes numbers, not {listing(wrong)}")
  return [int(text) for text in texts]


def _list(packs: Sequence[Pack]) -> None:
  rows = [
    (number, trial.name, trial, pack.why)
    if trial is pack.trials[0]
    else ("", trial.name, trial, "")
    for number, pack in enumerate(packs)
    for trial in pack.trials
  ]
  header = ("program", "trial", "changes", "why it is not in the first program")
  print(text_table.render(header, rows))
  count = sum(len(pack.trials) for pack in packs)
  print(f"{count} trials in {len(packs)} program{'s' * (len(packs) != 1)}")


if __name__ == "__main__":
  cli.run(main, FLAGS, config_flag.help_text)
