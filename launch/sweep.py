"""Hands each program of a sweep to a launcher: a job, or a pod slice, of its own.

  python -m launch.sweep --config=quickstart.py --workdir=/shared/sweep
    -- slurm --nodes=2 --gpus-per-node=8
  python -m launch.sweep --config=quickstart.py --workdir=gs://BUCKET/DIR
    -- gcloud --name=pod --zone=us-west4-a --accelerator=v5litepod-16 --create

The launcher follows `--`, with the flags that `python -m launch.slurm --help` lists;
--name is the start of the jobs' names. Before it stand flags of experiments.sweep:
--config, --config.NAME=VALUE for all trials, --at_once, --prune. DIR has to be where
the machines of the jobs see it.

The jobs are queued, and none is awaited: `python -m experiments.sweep --table` with the
same --config, --prune and --workdir shows later what is over. The same command again
submits the trials that are not submitted yet.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.cli import config_flag, run_flags
from experiments.sweeps import outcomes, plan, runner
from experiments.sweeps.plan import Plan
from launch import cluster
from launch import options as launch_options
from launch.engines import ENGINES
from lorax_flax.errors import LoraxError, check_known, listing
from lorax_flax.files import bucket
from lorax_flax.files import workdir as files

_SUBMITTED = "submitted.json"

FLAGS = flags.FlagValues()
config_flag.define(FLAGS)
WORKDIR = run_flags.workdir(FLAGS, "runs/CONFIG-sweep")
AT_ONCE = run_flags.at_once(FLAGS)
PRUNE = run_flags.prune(FLAGS)


def run(
  sweep: Plan,
  folder: Path,
  at_once: int,
  launcher: Sequence[str],
  arguments: Sequence[str],
) -> int:
  """Submits a job for each pack that is neither over nor submitted already.

  The folder keeps which have been: two jobs must not write the same trial.

  Args:
    folder: the sweep's, which the machines see too.
    at_once: largest number of trials that train together.
    launcher: its name and its flags, ["slurm", "--nodes=2"].
    arguments: of this command, for the jobs.

  Returns:
    The first bad exit code, or 0.

  Raises:
    LoraxError: no launcher, none of that name, or a flag of it that can't be; a search,
      which would have to wait for its trials.
  """
  if not launcher:
    raise LoraxError(
      f"which launcher? Give it after --, with its flags; there are {listing(ENGINES)}"
    )
  name, *own = launcher
  check_known("launcher", name, ENGINES)
  if sweep.space is not None:
    raise LoraxError(
      "a search chooses its trials by how others ended, and a launcher does not wait "
      "for them: run it where the devices are"
    )
  engine = ENGINES[name]
  options = cluster.read(engine, ["--name=sweep", *own])
  runner.claim(sweep, folder)
  known = sweep.next(folder, [])
  done = sum(end.over for end in outcomes.read(known, folder))
  left = runner.left_of(sweep, known, folder, at_once)
  print(f"{len(known)} trials, {done} of them over; {len(left)} jobs")
  file = folder / _SUBMITTED
  with bucket.reaching(file):
    submitted = files.read_json(file)["trials"] if file.exists() else []
  for pack in left:
    names = [trial.name for trial in pack.trials]
    if not set(submitted).isdisjoint(names):
      print(f"{pack} is submitted already. To do it again, delete {file}")
      continue
    job = f"{options.name}-{pack.trials[0].number:03}"
    command = runner.command(pack, folder, arguments)
    print(f"{job}: {pack}", flush=True)
    if code := cluster.submit(engine, command, replace(options, name=job)):
      return code
    submitted += names
    files.write_json(file, {"trials": submitted})
  return 0


def main(launcher: Sequence[str], argv: Sequence[str]) -> int:
  """The command; returns its exit code.

  Args:
    launcher: the arguments after `--`.
    argv: those before it, without the program's name.
  """
  config = config_flag.read(FLAGS)
  usual = f"{config_flag.default_workdir(config.spec)}-sweep"
  folder = bucket.folder(WORKDIR.value or usual)
  return run(plan.of(config, PRUNE.value), folder, AT_ONCE.value, launcher, argv)


if __name__ == "__main__":
  ARGV, LAUNCHER = launch_options.split(sys.argv)
  cli.run(lambda: main(LAUNCHER, ARGV[1:]), FLAGS, config_flag.help_text, ARGV)
