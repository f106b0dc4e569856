"""Hands a sweep's programs to a launcher: a job, or a pod slice, for each."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.sweeps import outcomes, runner
from experiments.sweeps.plan import Plan
from launch import cluster
from launch.engines import ENGINES
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.files import bucket
from lorax_flax.files import workdir as files

_SUBMITTED = "submitted.json"


def run(
  plan: Plan, folder: Path, at_once: int, text: str, arguments: Sequence[str]
) -> int:
  """Submits a job for each unit that is neither over nor submitted already.

  Which have been is kept in the folder: two jobs must not write the same trial.

  Args:
    folder: of the sweep, which the machines see too.
    at_once: how many trials train together at most.
    text: the launcher's name and its flags, "slurm --nodes=2".
    arguments: of this command, for the jobs.

  Returns:
    The first bad exit code.

  Raises:
    LoraxError: no such launcher, or a flag of it that can't be; a search, which would
      have to wait for its trials.
  """
  name, *own = shlex.split(text) or [""]
  if name not in ENGINES:
    raise LoraxError(unknown("launcher", name, ENGINES))
  if plan.space is not None:
    raise LoraxError(
      "a search chooses its trials by how others ended, and a launcher does not wait "
      "for them: run it where the devices are"
    )
  engine = ENGINES[name]
  options = cluster.read(engine, ["--name=sweep", *own])
  arguments = [a for a in arguments if not re.match("--?launch=", a)]
  runner.claim(plan, folder)
  known = plan.next(folder, [])
  done = sum(end.over for end in outcomes.read(known, folder))
  left = runner.left_of(plan, known, folder, at_once)
  print(f"{len(known)} trials, {done} of them over; {len(left)} jobs")
  file = folder / _SUBMITTED
  with bucket.reaching(file):
    submitted = files.read_json(file)["trials"] if file.exists() else []
  for wanted in left:
    names = [trial.name for trial in wanted.trials]
    if not set(submitted).isdisjoint(names):
      print(f"{wanted} is submitted already. To do it again, delete {file}")
      continue
    job = f"{options.name}-{wanted.trials[0].number:03}"
    command = runner.command(wanted, folder, arguments)
    print(f"{job}: {wanted}", flush=True)
    if code := cluster.submit(engine, command, replace(options, name=job)):
      return code
    submitted += names
    files.write_json(file, {"trials": submitted})
  return 0
