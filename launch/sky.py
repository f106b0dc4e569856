"""Runs a command on machines of any cloud, through SkyPilot.

  python -m launch.sky --name=run --accelerators=tpu-v5litepod-16 --infra=gcp
    -- -m experiments.run --config=quickstart.py --workdir=gs://bucket/run
  python -m launch.sky --name=run --accelerators=H100:8 --nodes=4 --managed --spot -- …

SkyPilot copies the code to the machines, installs it once, and runs what
follows `--` with Python on each. The task it is given stays in runs/launch/NAME.yaml.
A training run joins the others by itself; with several machines, or --managed, its
workdir has to be in a bucket.

With --managed SkyPilot watches the job and starts it again, on other machines if need
be, when the machines are taken away, when a run has saved and exited with 143, and up
to --max-restarts times when it fails; the run goes on from the last checkpoint.
Otherwise --down ends the machines with the job. Any other flag of `sky launch` goes
through --extra.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launch import cluster
from launch.cluster import Call, option
from lorax_flax.distributed.processes import PREEMPTED
from lorax_flax.errors import LoraxError

_PORT = 8476
# JAX does not know SkyPilot, whose variables say the same under other names. On a TPU
# slice JAX has to number the processes itself, as their chips lie.
_JOIN = f"""\
export JAX_COORDINATOR_ADDRESS="$(head -n1 <<< "$SKYPILOT_NODE_IPS"):{_PORT}"
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


@dataclass(frozen=True, kw_only=True)
class Options(cluster.Options):
  """Of a task; `name` is the machines', or the managed job's."""

  accelerators: str | None = option(
    None, "such as H100:8 or tpu-v5litepod-16; without it, plain processors"
  )
  infra: str | None = option(None, "such as gcp/us-west4 or k8s; SkyPilot's choice")
  nodes: int = option(1, "machines", least=1)
  cpus: str | None = option(None, "cores of a machine, such as 8+")
  memory: str | None = option(None, "GiB of a machine, such as 64+")
  spot: bool = option(False, "cheaper machines, that may be taken away")
  managed: bool = option(False, "as a managed job (`sky jobs launch`)")
  max_restarts: int = option(0, "with --managed: after how many errors to try again")
  down: bool = option(False, "end the machines with the job; a managed job's always do")
  send: tuple[str, ...] = option(
    (), "a file or folder here that is sent as well, such as a config of yours"
  )
  extras: str | None = option(None, "of the project to install; by the accelerators")

  def __post_init__(self):
    super().__post_init__()
    if self.managed and self.down:
      raise LoraxError("--down means nothing with --managed")
    if self.max_restarts and not self.managed:
      raise LoraxError("--max-restarts means nothing without --managed")


def render(command: Sequence[str], options: Options) -> list[Call]:
  """The calls: lay out the code, and hand it to sky with a task that says all."""
  file = f"{cluster.FOLDER}/{options.name}.yaml"
  folder, calls = cluster.laid_out(options.name, options.send)
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
        # Without it SkyPilot leaves out what git ignores, which all of `runs` may be.
        f"{folder}/.skyignore": "# nothing\n",
      },
    ),
  ]


def task(command: Sequence[str], options: Options, folder: str) -> dict[str, Any]:
  """SkyPilot's task.

  Args:
    folder: with the code, to be copied.
  """
  tpu = (options.accelerators or "").startswith("tpu-")
  if tpu and options.nodes > 1:
    raise LoraxError("--nodes: SkyPilot's TPU slices do not form one run; use xpk")
  line = cluster.python(".venv/bin/python", command, (), cluster=tpu)
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
    "setup": cluster.install(extras) + "\n",
    "run": ("" if tpu else _JOIN) + "exec " + line + "\n",
  }


def _extras(accelerators: str | None) -> str:
  if accelerators is None:
    return "gcs"
  return "tpu,gcs" if accelerators.startswith("tpu-") else "cuda,gcs"


class _Dumper(yaml.SafeDumper):
  """Writes texts of several lines as they are."""


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
  options=Options,
  render=render,
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
