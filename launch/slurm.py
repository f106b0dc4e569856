"""Runs a command as a Slurm job, one process per task, through sbatch and srun.

  python -m launch.slurm --name=run --nodes=4 --gpus-per-node=8 --time=12:00:00
    -- -m experiments.run --config=quickstart.py --workdir=/shared/run

Run it on a login node, with the project and the workdir in folders that all nodes
share: the job starts in the working directory, with the Python that runs this (--python
names another). With GPUs, each GPU gets its own process.

Some time before the job's time limit (--warn), and before it is preempted, Slurm sends
SIGTERM: a run saves a checkpoint and exits with 143, and the job is queued again and
resumes, up to --max-restarts times. A job that loses a node is queued again too. A job
that fails otherwise, or that scancel ends, is not. --extra passes on any other flag of
sbatch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch import cluster
from launch.calls import Call, flags, python
from launch.options import Options, option
from lorax_flax.distributed.processes import PREEMPTED


@dataclass(frozen=True, kw_only=True)
class Job(Options):
  """Options of a job; None leaves an option to Slurm."""

  nodes: int = option(1, "number of nodes", least=1)
  tasks_per_node: int | None = option(
    None, "processes of each node; by default one per GPU, or one", least=1
  )
  gpus_per_node: int | None = option(None, "GPUs of each node", least=1)
  cpus_per_task: int | None = option(None, "CPU cores of each process", least=1)
  partition: str | None = option(None, "the partition to queue in")
  account: str | None = option(None, "the account to charge")
  time: str | None = option(None, "time limit, such as 12:00:00")
  output: str | None = option(None, "file for the output; by default slurm-JOB.out")
  warn: int = option(120, "seconds before the time limit to send SIGTERM")
  max_restarts: int = option(100, "number of times that the job may be queued again")
  python: str = option(sys.executable, "the interpreter on the nodes")


def render(command: Sequence[str], options: Job) -> list[Call]:
  """One call of sbatch, with the job's script on standard input."""
  line = python(options.python, command, options.env, cluster=True)
  tasks = options.tasks_per_node or options.gpus_per_node or 1
  return [
    Call(
      (
        *("sbatch", f"--job-name={options.name}", f"--nodes={options.nodes}"),
        f"--ntasks-per-node={tasks}",
        *flags(options, "gpus_per_node", "cpus_per_task", "partition"),
        *flags(options, "account", "time", "output"),
        # A job that is queued again appends to its output file.
        *("--requeue", "--open-mode=append", f"--signal=TERM@{options.warn}"),
        *options.extra,
      ),
      stdin=_script(line, options.max_restarts),
    )
  ]


def _script(line: str, max_restarts: int) -> str:
  # Other tasks may still be saving when the first exits with 143, so srun must not kill
  # them, whatever the cluster's default. Tasks that lose a peer end by themselves.
  return f"""#!/bin/bash
srun --kill-on-bad-exit=0 {line}
code=$?
if [ "$code" -eq {PREEMPTED} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]
then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


ENGINE = cluster.Engine(
  name="slurm",
  client="sbatch",
  install="it is on a Slurm cluster's login nodes; run this command there",
  options=Job,
  render=render,
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
