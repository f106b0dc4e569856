"""Runs a command as a Slurm job, one process a task, through sbatch and srun.

  python -m launch.slurm --name=run --nodes=4 --gpus-per-node=8 --time=12:00:00
    -- -m experiments.run --config=quickstart.py --workdir=/shared/run

Give it on a login node, with the project and the workdir in folders that all nodes see:
the job starts in the folder where this is given, with the Python that runs this
(--python names another). With GPUs each gets a process of its own.

Some time before the job's time is up (--warn), and before it is preempted, Slurm sends
SIGTERM: a run saves and exits with 143, and the job is queued again and goes on, up to
--max-restarts times. A job that loses a node is queued again too. A job that fails
otherwise, or that scancel ends, is not. Any other flag of sbatch goes through --extra.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch import cluster
from launch.cluster import Call, option
from lorax_flax.distributed.processes import PREEMPTED


@dataclass(frozen=True, kw_only=True)
class Options(cluster.Options):
  """Of a job; what is None is left to Slurm."""

  nodes: int = option(1, "machines", least=1)
  tasks_per_node: int | None = option(
    None, "processes on each; one for every GPU, and one without GPUs", least=1
  )
  gpus_per_node: int | None = option(None, "GPUs of each", least=1)
  cpus_per_task: int | None = option(None, "cores of each process", least=1)
  partition: str | None = option(None, "where to queue")
  account: str | None = option(None, "that is charged")
  time: str | None = option(None, "how long at most, such as 12:00:00")
  output: str | None = option(None, "the file of all lines; slurm-JOB.out without it")
  warn: int = option(120, "seconds before the time is up to send SIGTERM")
  max_restarts: int = option(100, "how often the job may be queued again")
  python: str = option(sys.executable, "the interpreter, on the nodes")


def render(command: Sequence[str], options: Options) -> list[Call]:
  """One call of sbatch, which reads the job's script."""
  line = cluster.python(options.python, command, options.env, cluster=True)
  tasks = options.tasks_per_node or options.gpus_per_node or 1
  given = {
    "gpus-per-node": options.gpus_per_node,
    "cpus-per-task": options.cpus_per_task,
    "partition": options.partition,
    "account": options.account,
    "time": options.time,
    "output": options.output,
  }
  return [
    Call(
      (
        *("sbatch", f"--job-name={options.name}", f"--nodes={options.nodes}"),
        f"--ntasks-per-node={tasks}",
        *cluster.flags(given),
        # The lines of a job that was queued again follow those before.
        *("--requeue", "--open-mode=append", f"--signal=TERM@{options.warn}"),
        *options.extra,
      ),
      stdin=_script(line, options.max_restarts),
    )
  ]


def _script(line: str, max_restarts: int) -> str:
  # The other tasks may be saving still when the first has exited with 143: srun is not
  # to kill them, whatever the cluster's usual setting. Those that must end do.
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
  install="it is on a Slurm cluster's login nodes; give this command there",
  options=Options,
  render=render,
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
