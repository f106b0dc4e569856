"""Runs a command on TPUs of a GKE cluster, through xpk.

  python -m launch.xpk --name=run --cluster=pods --zone=us-east5-a --tpu-type=v6e-16
    --max-restarts=10 -- -m experiments.run --config=quickstart.py --workdir=gs://bucket/run

xpk copies the code into an image, on top of --base-image, and each worker installs it
when it starts; --image names an image that has it installed already. A training run
finds its other processes by itself, and its workdir has to be in a bucket.

On SIGTERM, which a pod gets before it is preempted, a run saves a checkpoint and exits
with 143. GKE then restarts the job, as it does after the loss of a machine, up to
--max-restarts times, and the run resumes from the last checkpoint. An error of the run
(exit code 1) is not retried. --extra passes on any other flag of `xpk workload create`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch import cluster
from launch.calls import Call, flags, python
from launch.options import REQUIRED, SEND, Options, option
from launch.project import unpacked
from lorax_flax.errors import LoraxError

_BASE = "python:3.12"


@dataclass(frozen=True, kw_only=True)
class Workload(Options):
  """Options of a workload; None leaves an option to xpk."""

  cluster: str = option(REQUIRED, "the GKE cluster, made by xpk")
  tpu_type: str = option(REQUIRED, "such as v6e-16")
  num_slices: int = option(1, "number of slices of the run", least=1)
  zone: str | None = option(None, "such as us-east5-a; by default gcloud's own")
  project: str | None = option(
    None, "the Google Cloud project; by default gcloud's own"
  )
  max_restarts: int = option(0, "number of times that the job may restart")
  priority: str | None = option(None, "very-low, low, medium, high or very-high")
  grace: int = option(120, "seconds to save in, from SIGTERM to the end")
  base_image: str | None = option(None, f"image to add the code to; by default {_BASE}")
  send: tuple[str, ...] = SEND
  image: str | None = option(None, "an image with the code installed")

  def __post_init__(self):
    super().__post_init__()
    if self.image is not None and self.base_image is not None:
      raise LoraxError("give --image or --base-image, not both")
    if self.image is not None and self.send:
      raise LoraxError("--send has no effect with --image")


def render(command: Sequence[str], options: Workload) -> list[Call]:
  """Calls that unpack the code for the image, and submit the workload to xpk."""
  # xpk's shell passes SIGTERM on to its child, which exec turns into the run.
  line = "exec " + python("python", command, options.env, cluster=True)
  calls: list[Call] = []
  if options.image is not None:
    image = [f"--docker-image={options.image}"]
  else:
    base = options.base_image or _BASE
    folder, calls = unpacked(options.name, options.send)
    image = [f"--base-docker-image={base}", f"--script-dir={folder}"]
    line = f"python -m pip install -q -e '.[tpu,gcs]' && {line}"
  return [
    *calls,
    Call(
      (
        *("xpk", "workload", "create", f"--cluster={options.cluster}"),
        *(f"--workload={options.name}", f"--tpu-type={options.tpu_type}"),
        f"--num-slices={options.num_slices}",
        *flags(options, "zone", "project", "priority"),
        *image,
        f"--max-restarts={options.max_restarts}",
        f"--termination-grace-period-seconds={options.grace}",
        *options.extra,
        f"--command={line}",
      )
    ),
  ]


ENGINE = cluster.Engine(
  name="xpk", client="xpk", install="pip install xpk", options=Workload, render=render
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
