"""Runs a command on machines of any cloud, through SkyPilot.

  python -m launch.sky --name=run --accelerators=tpu-v5litepod-16 --infra=gcp
    -- -m experiments.run --config=quickstart.py --workdir=gs://bucket/run
  python -m launch.sky --name=run --accelerators=H100:8 --nodes=4 --managed --spot -- …

SkyPilot copies the code to the machines, installs it once, and runs Python with the
arguments after `--` on each. The task that it gets is kept in runs/launch/NAME.yaml. A
training run finds its other processes by itself; with several machines, or --managed,
its workdir has to be in a bucket.

With --managed SkyPilot watches the job and restarts it, on other machines if it has to:
when the machines are preempted, when a run saved and exited with 143, and up to
--max-restarts times when it fails. The run resumes from the last checkpoint. Without
it, --down ends the machines with the job. --extra passes on any other flag of
`sky launch`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launch import cluster
from launch.calls import Call, python
from launch.options import SEND, Options, option
from launch.project import FOLDER, install, unpacked
from lorax_flax.distributed.processes import PREEMPTED
from lorax_flax.errors import LoraxError

_PORT = 8476
# JAX does not read SkyPilot's variables, so they are given under JAX's names. On a TPU
# slice JAX has to number the processes itself, by the coordinates of their chips.
_INITIALIZE = f"""\
export JAX_COORDINATOR_ADDRESS="$(head -n1 <<< "$SKYPILOT_NODE_IPS"):{_PORT}"
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


@dataclass(frozen=True, kw_only=True)
class Task(Options):
  """Options of a task; `name` is the cluster's, or the managed job's."""

  accelerators: str | None = option(
    None, "such as H100:8 or tpu-v5litepod-16; by default CPUs alone"
  )
  infra: str | None = option(
    None, "such as gcp/us-west4 or k8s; by default SkyPilot's choice"
  )
  nodes: int = option(1, "number of machines", least=1)
  cpus: str | None = option(None, "CPU cores of a machine, such as 8+")
  memory: str | None = option(None, "GiB of a machine, such as 64+")
  spot: bool = option(False, "cheaper machines, which may be preempted")
  managed: bool = option(False, "as a managed job (`sky jobs launch`)")
  max_restarts: int = option(0, "with --managed: number of errors to retry after")
  down: bool = option(False, "end the machines with the job, as --managed always does")
  send: tuple[str, ...] = SEND
  extras: str | None = option(
    None, "the project's extras to install; by default those of the accelerators"
  )

  def __post_init__(self):
    super().__post_init__()
    if self.managed and self.down:
      raise LoraxError("--down has no effect with --managed")
    if self.max_restarts and not self.managed:
      raise LoraxError("--max-restarts has no effect without --managed")


def render(command: Sequence[str], options: Task) -> list[Call]:
  """Calls that unpack the code, write the task, and submit it to sky."""
  file = f"{FOLDER}/{options.name}.yaml"
  folder, calls = unpacked(options.name, options.send)
  if options.managed:
    call = ["sky", "jobs", "launch", "--name", options.name]
  else:
    call = ["sky", "launch", "--cluster", options.name]
    call += ["--down"] if options.down else []
  return [
    *calls,
    Call(
      (*call, "--yes", "--detach-run", *options.extra, file),
      files={
        file: _dump(task(command, options, folder)),
        # Otherwise SkyPilot skips the files that git ignores, often all of `runs`.
        f"{folder}/.skyignore": "# nothing\n",
      },
    ),
  ]


def task(command: Sequence[str], options: Task, folder: str) -> dict[str, Any]:
  """The task, as a dict of SkyPilot's YAML.

  Args:
    folder: the folder with the code, which SkyPilot copies.
  """
  tpu = (options.accelerators or "").startswith("tpu-")
  if tpu and options.nodes > 1:
    raise LoraxError("--nodes: SkyPilot's TPU slices do not form one run; use xpk")
  line = python(".venv/bin/python", command, (), cluster=tpu)
  extras = options.extras or _extras(options.accelerators)
  resources = {
    "accelerators": options.accelerators,
    "infra": options.infra,
    "cpus": options.cpus,
    "memory": options.memory,
    "use_spot": options.spot or None,
    "job_recovery": {
      "max_restarts_on_errors": options.max_restarts,
      "recover_on_exit_codes": [PREEMPTED],
    }
    if options.managed
    else None,
  }
  return {
    "name": options.name,
    "resources": {k: v for k, v in resources.items() if v is not None},
    "num_nodes": options.nodes,
    "workdir": folder,
    "envs": dict(setting.split("=", 1) for setting in options.env),
    "setup": install(extras) + "\n",
    "run": ("" if tpu else _INITIALIZE) + "exec " + line + "\n",
  }


def _extras(accelerators: str | None) -> str:
  if accelerators is None:
    return "gcs"
  return "tpu,gcs" if accelerators.startswith("tpu-") else "cuda,gcs"


class _Dumper(yaml.SafeDumper):
  """A YAML dumper that writes multi-line strings as literal blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
  style = "|" if text.endswith("\n") else None
  return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _dump(value: Any) -> str:
  return yaml.dump(
    value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9
  )


ENGINE = cluster.Engine(
  name="sky",
  client="sky",
  install="pip install 'skypilot[gcp]', or with the clouds that you use",
  options=Task,
  render=render,
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
