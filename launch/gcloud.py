"""Runs a command on every worker of a TPU pod slice, through gcloud.

  python -m launch.gcloud --name=pod --zone=us-west4-a --accelerator=v5litepod-16
    --create -- -m experiments.run --config=quickstart.py --workdir=gs://bucket/run

--create makes the TPU VMs first. The project's code is sent to each at every launch,
and installed where it is not yet; what follows `--` is given to Python there, in the
folder lorax_flax. The lines of all workers are shown until they end. A training run
joins the others by itself, and its workdir has to be in a bucket.

Told to stop (SIGTERM, which a pod gets before it is preempted), a run saves and exits
with 143; a pod that is gone is made anew with --create, and the same command goes on.
Pass --extra=--internal-ip, or any other flag, on to `ssh` and `scp`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch import cluster
from launch.cluster import REQUIRED, Call, option
from lorax_flax.errors import LoraxError, listing

# The VM's software, by the accelerator.
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
class Options(cluster.Options):
  """Of a TPU VM; `name` is the pod slice's."""

  zone: str = option(REQUIRED, "such as us-west4-a")
  project: str | None = option(None, "Google Cloud's; gcloud's own setting without it")
  accelerator: str | None = option(None, "such as v5litepod-16; for --create")
  create: bool = option(False, "make the TPU VMs first")
  spot: bool = option(False, "with --create: cheaper, and may be taken away")
  runtime: str | None = option(None, "the VM's software; follows from the accelerator")
  send: tuple[str, ...] = option(
    (), "a file or folder here that is sent as well, such as a config of yours"
  )
  setup: str = option(cluster.install("tpu,gcs"), "what installs the code on a worker")

  def __post_init__(self):
    super().__post_init__()
    if self.create and self.accelerator is None:
      raise LoraxError("--create wants --accelerator, such as v5litepod-16")
    if self.spot and not self.create:
      raise LoraxError("--spot means nothing without --create")


def render(command: Sequence[str], options: Options) -> list[Call]:
  """The calls: make the VMs, pack the code, copy it, and run."""
  line = cluster.python(".venv/bin/python", command, options.env, cluster=True)
  remote = (
    f"mkdir -p {_REMOTE} && cd {_REMOTE} && tar -xzf ../{_ARCHIVE} && "
    f"{{ {options.setup}; }} && exec {line}"
  )
  archive, pack = cluster.packed(options.name, options.send)
  where = cluster.flags({"zone": options.zone, "project": options.project})
  where.append("--quiet")
  everywhere = [*where, "--worker=all", *options.extra]
  return [
    *_create(options, where),
    *pack,
    _tpu_vm("scp", archive, f"{options.name}:{_ARCHIVE}", *everywhere),
    _tpu_vm("ssh", options.name, f"--command={remote}", *everywhere),
  ]


def _create(options: Options, where: Sequence[str]) -> list[Call]:
  if not options.create:
    return []
  spot = ["--spot"] if options.spot else []
  kind = [f"--accelerator-type={options.accelerator}", f"--version={_runtime(options)}"]
  return [_tpu_vm("create", options.name, *where, *kind, *spot)]


def _runtime(options: Options) -> str:
  if options.runtime is not None:
    return options.runtime
  family = (options.accelerator or "").partition("-")[0]
  if family not in _RUNTIMES:
    raise LoraxError(
      f"--accelerator={options.accelerator}: no --runtime is known for it. There are "
      f"accelerators {listing(_RUNTIMES)}, followed by -8, -16, …"
    )
  return _RUNTIMES[family]


def _tpu_vm(verb: str, *arguments: str) -> Call:
  return Call(("gcloud", "compute", "tpus", "tpu-vm", verb, *arguments))


ENGINE = cluster.Engine(
  name="gcloud",
  client="gcloud",
  install="install the Google Cloud CLI (its package is google-cloud-cli)",
  options=Options,
  render=render,
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
