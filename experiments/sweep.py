"""Runs the trials of a config's sweep, those that can together, and makes one table.

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

  python -m experiments.sweep --config=… --workdir=gs://BUCKET/DIR
    --launch="gcloud --name=pod --zone=us-west4-a --accelerator=v5litepod-16 --create"

hands each program to a pod slice of its own; --table then makes the table.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags
from rich import console as rich_console
from rich import table as rich_table

from experiments.cli import command as cli
from experiments.cli import config_flag, large_pages
from experiments.sweeps import trials
from experiments.sweeps.trials import Trial, Unit
from lorax_flax.errors import LoraxError, listing

CONFIG = config_flag.define(flags.FLAGS)
flags.declare_key_flag("config")
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where all is written; runs/CONFIG-sweep where it isn't given.",
)
LIST = flags.DEFINE_bool(
  "list",
  False,
  "Print the trials, which train together and why, and run nothing.",
)
AT_ONCE = flags.DEFINE_integer(
  "at_once",
  8,
  "How many trials train together at most: each needs memory for its batch.",
  lower_bound=1,
)
JOBS = flags.DEFINE_integer(
  "jobs",
  1,
  "How many processes run at a time, of trials that do not train together.",
  lower_bound=1,
)
LAUNCH = flags.DEFINE_string(
  "launch",
  None,
  "Hand each program to a launcher, one a job (a pod slice), and wait for none: "
  '"slurm --nodes=2", or gcloud, xpk or sky, with the flags that '
  "`python -m launch.slurm --help` lists; --name is the start of the jobs' names. DIR "
  "has to be where those machines see it. --table shows later what is over.",
)
TABLE = flags.DEFINE_bool(
  "table", False, "Make the table of what is over in DIR, and run nothing."
)
TRIALS = flags.DEFINE_list(
  "trials",
  None,
  "Train these alone, by number, which train together, and make no table: what a "
  "sweep starts in a process of its own.",
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other processes that the cluster (Slurm, a TPU pod, …) has started.",
)


def main() -> int:
  config = config_flag.given(CONFIG)
  spec = config_flags.get_config_filename(flags.FLAGS["config"])
  from experiments.sweeps import plan

  wanted = plan.of(spec, config, config_flag.overridden(sys.argv))
  if LIST.value:
    _list(wanted.listed(), AT_ONCE.value)
    return 0
  large_pages.restart()
  from experiments.sweeps import runner
  from launch import sweep
  from lorax_flax.distributed import processes
  from lorax_flax.files import bucket

  usual = config_flag.default_workdir(spec)
  folder = bucket.folder(WORKDIR.value or f"{usual}-sweep")
  if TRIALS.value is not None:
    processes.initialize(DISTRIBUTED.value)
    return runner.train(wanted, folder, _numbers(TRIALS.value))
  if DISTRIBUTED.value or processes.COORDINATOR in os.environ:
    raise LoraxError(
      "several processes train some trials together, and do not run a sweep: name "
      "the trials, --trials=0,1,2"
    )
  if TABLE.value:
    return runner.table(wanted, folder)
  if LAUNCH.value is not None:
    return sweep.run(wanted, folder, AT_ONCE.value, LAUNCH.value, sys.argv[1:])
  return runner.run(wanted, folder, AT_ONCE.value, JOBS.value, sys.argv[1:])


def _numbers(texts: Sequence[str]) -> list[int]:
  if wrong := [text for text in texts if not text.isdecimal()]:
    raise LoraxError(f"--trials wants numbers, not {listing(wrong)}")
  return [int(text) for text in texts]


def _list(found: Sequence[Trial], most: int) -> None:
  units: list[Unit] = trials.units(found, most)
  table = rich_table.Table()
  for name in ("unit", "trial", "what it sets", "why it is not with the first"):
    table.add_column(name, overflow="fold")
  for number, unit in enumerate(units):
    for trial in unit.trials:
      first = trial is unit.trials[0]
      table.add_row(
        str(number) if first else "", trial.name, str(trial), unit.why if first else ""
      )
  console = rich_console.Console(highlight=False)
  console.print(table)
  console.print(f"{len(found)} trials in {_count(len(units), 'program')}")


def _count(n: int, noun: str) -> str:
  return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


if __name__ == "__main__":
  cli.run(main, flags.FLAGS, config_flag.help_text)
