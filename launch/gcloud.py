"""Runs a command on every worker of a TPU pod slice, through gcloud.

  python -m launch.gcloud --name=pod --zone=us-west4-a --accelerator=v5litepod-16
    --create -- -m experiments.run --config=quickstart.py --workdir=gs://bucket/run

--create makes the TPU VMs first. Every launch sends the project's code to each worker,
and installs it where it is not installed. The arguments after `--` go to Python there,
in the folder lorax_flax. The output of all workers is shown until they end. A training
run finds its other processes by itself, and its workdir has to be in a bucket.

On SIGTERM, which a pod gets before it is preempted, a run saves a checkpoint and exits
with 143. To resume after that, give the same command again (with --create if the pod is
gone). --extra=--internal-ip passes a flag on to `ssh` and `scp`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch import cluster
from launch.calls import Call, flags, python
from launch.options import REQUIRED, SEND, Options, option
from launch.project import install, packed
from lorax_flax.errors import LoraxError, listing

# The VM's software by accelerator.
_RUNTIMES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
_ARCHIVE = "lorax_flax.tar.gz"
_REMOTE = "lorax_flax"


@dataclass(frozen=True, kw_only=True)
class Pod(Options):
  """Options of a TPU pod slice, whose name is `name`."""

  zone: str = option(REQUIRED, "such as us-west4-a")
  project: str | None = option(
    None, "the Google Cloud project; by default gcloud's own"
  )
  accelerator: str | None = option(None, "such as v5litepod-16; for --create")
  create: bool = option(False, "make the TPU VMs first")
  spot: bool = option(False, "with --create: cheaper, and may be preempted")
  runtime: str | None = option(None, "the VM's software; by default the accelerator's")
  send: tuple[str, ...] = SEND
  setup: str = option(
    install("tpu,gcs"), "shell command that installs the code on a worker"
  )

  def __post_init__(self):
    super().__post_init__()
    if self.create and self.accelerator is None:
      raise LoraxError("--create needs --accelerator, such as v5litepod-16")
    if self.spot and not self.create:
      raise LoraxError("--spot has no effect without --create")


def render(command: Sequence[str], options: Pod) -> list[Call]:
  """Calls that make the VMs, pack the code, copy it, and run the command."""
  line = python(".venv/bin/python", command, options.env, cluster=True)
  remote = (
    f"mkdir -p {_REMOTE} && cd {_REMOTE} && tar -xzf ../{_ARCHIVE} && "
    f"{{ {options.setup}; }} && exec {line}"
  )
  archive, pack = packed(options.name, options.send)
  where = [*flags(options, "zone", "project"), "--quiet"]
  everywhere = [*where, "--worker=all", *options.extra]
  return [
    *_create(options, where),
    *pack,
    _tpu_vm("scp", archive, f"{options.name}:{_ARCHIVE}", *everywhere),
    _tpu_vm("ssh", options.name, f"--command={remote}", *everywhere),
  ]


def _create(options: Pod, where: Sequence[str]) -> list[Call]:
  if not options.create:
    return []
  spot = ["--spot"] if options.spot else []
  kind = [f"--accelerator-type={options.accelerator}", f"--version={_runtime(options)}"]
  return [_tpu_vm("create", options.name, *where, *kind, *spot)]


def _runtime(options: Pod) -> str:
  if options.runtime is not None:
    return options.runtime
  family = (options.accelerator or "").partition("-")[0]
  if family not in _RUNTIMES:
    raise LoraxError(
      f"--accelerator={options.accelerator}: give its --runtime too. Known "
      f"accelerators are {listing(_RUNTIMES)}, followed by -8, -16, …"
    )
  return _RUNTIMES[family]


def _tpu_vm(verb: str, *arguments: str) -> Call:
  return Call(("gcloud", "compute", "tpus", "tpu-vm", verb, *arguments))


ENGINE = cluster.Engine(
  name="gcloud",
  client="gcloud",
  install="install the Google Cloud CLI (its package is google-cloud-cli)",
  options=Pod,
  render=render,
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
