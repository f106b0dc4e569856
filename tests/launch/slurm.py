"""A cluster of one machine: what the tests need of sbatch, srun and scontrol.

`python slurm.py sbatch|srun|scontrol ARGUMENTS`. Nodes are all this machine, and sbatch
waits for the job's end. See the manual pages of Slurm for what each does.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

# JAX takes the coordinator's port from the number of the job: its ports begin here.
FIRST_PORT = 65535 - 2**12 + 1


def sbatch(arguments: list[str]) -> int:
  given = dict(a.removeprefix("--").partition("=")[::2] for a in arguments)
  tasks = int(given["nodes"]) * int(given["ntasks-per-node"])
  script = sys.stdin.read()
  again = Path(os.environ["STANDIN_FOLDER"]) / "requeued"
  starts = 0
  while True:
    environment = {"SLURM_NTASKS": str(tasks), "SLURM_RESTART_COUNT": str(starts)}
    environment["SLURM_JOB_ID"] = os.environ["STANDIN_JOB"]
    print(f"slurm: start {starts} of {given['job-name']}", flush=True)
    done = subprocess.run(
      ["bash", "-c", script], env=os.environ | environment, check=False
    )
    starts += 1
    if not again.exists():
      print(f"slurm: the job ended with {done.returncode}", flush=True)
      return 0  # As of any job that could be queued.
    again.unlink()


def srun(arguments: list[str]) -> int:
  command = [a for a in arguments if a != "--kill-on-bad-exit=0"]
  count = int(os.environ["SLURM_NTASKS"])
  step = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1"}
  tasks = [
    subprocess.Popen(
      command,
      env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
    )
    for i in range(count)
  ]
  signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
  codes = [task.wait() for task in tasks]
  return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(arguments: list[str]) -> int:
  assert arguments == ["requeue", os.environ["STANDIN_JOB"]]
  (Path(os.environ["STANDIN_FOLDER"]) / "requeued").touch()
  return 0


if __name__ == "__main__":
  sys.exit(
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:])
  )
