"""Runs a command on TPUs of a GKE cluster, through xpk.

  python -m launch.xpk --name=run --cluster=pods --zone=us-east5-a --tpu-type=v6e-16
    --max-restarts=10 -- -m experiments.run --config=quickstart.py --workdir=gs://bucket/run

xpk copies the code into an image, on top of --base-image, and each
worker installs it when it starts; --image names one that has it installed already. A
training run joins the others by itself, and its workdir has to be in a bucket.

Told to stop (SIGTERM, which a pod gets before it is preempted), a run saves and exits
with 143. GKE starts the job again then, as after a machine that is lost, up to
--max-restarts times, and it goes on from the last checkpoint. A mistake of yours (code
1) is not tried again. Any other flag of `xpk workload create` goes through --extra.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch import cluster
from launch.cluster import REQUIRED, Call, option
from lorax_flax.errors import LoraxError

_BASE = "python:3.12"


@dataclass(frozen=True, kw_only=True)
class Options(cluster.Options):
  """Of a workload; what is None is left to xpk."""

  cluster: str = option(REQUIRED, "GKE's, as xpk made it")
  tpu_type: str = option(REQUIRED, "such as v6e-16")
  num_slices: int = option(1, "how many of them, as one run", least=1)
  zone: str | None = option(None, "such as us-east5-a; gcloud's own without it")
  project: str | None = option(None, "Google Cloud's; gcloud's own without it")
  max_restarts: int = option(0, "how often the job may start again")
  priority: str | None = option(None, "very-low, low, medium, high or very-high")
  grace: int = option(120, "seconds from SIGTERM to the end, to save in")
  base_image: str | None = option(None, f"that the code is put on; {_BASE} without it")
  send: tuple[str, ...] = option(
    (), "a file or folder here that is sent as well, such as a config of yours"
  )
  image: str | None = option(None, "that has the code installed")

  def __post_init__(self):
    super().__post_init__()
    if self.image is not None and self.base_image is not None:
      raise LoraxError("give --image or --base-image, not both")
    if self.image is not None and self.send:
      raise LoraxError("--send means nothing with --image")


def render(command: Sequence[str], options: Options) -> list[Call]:
  """The calls: lay out the code for the image, and hand it to xpk."""
  # xpk's shell passes SIGTERM on to what it has started, which is to become the run.
  line = "exec " + cluster.python("python", command, options.env, cluster=True)
  calls: list[Call] = []
  if options.image is not None:
    image = [f"--docker-image={options.image}"]
  else:
    base = options.base_image or _BASE
    folder, calls = cluster.laid_out(options.name, options.send)
    image = [f"--base-docker-image={base}", f"--script-dir={folder}"]
    line = f"python -m pip install -q -e '.[tpu,gcs]' && {line}"
  given = {
    "zone": options.zone,
    "project": options.project,
    "priority": options.priority,
  }
  return [
    *calls,
    Call(
      (
        *("xpk", "workload", "create", f"--cluster={options.cluster}"),
        *(f"--workload={options.name}", f"--tpu-type={options.tpu_type}"),
        f"--num-slices={options.num_slices}",
        *cluster.flags(given),
        *image,
        f"--max-restarts={options.max_restarts}",
        f"--termination-grace-period-seconds={options.grace}",
        *options.extra,
        f"--command={line}",
      )
    ),
  ]


ENGINE = cluster.Engine(
  name="xpk",
  client="xpk",
  install="pip install xpk",
  options=Options,
  render=render,
)

if __name__ == "__main__":
  sys.exit(cluster.main(ENGINE, __doc__, sys.argv[1:]))
