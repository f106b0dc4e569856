"""The ways to run a command elsewhere, by name.

    options = ENGINES["slurm"].options(name="trial-3", nodes=2)
    code = cluster.submit(ENGINES["slurm"], ["-m", "experiments.run", …], options)

gcloud ends with the command; the others return when the job is queued.
"""

from typing import Any

from launch import gcloud, sky, slurm, xpk
from launch.cluster import Engine

ENGINES: dict[str, Engine[Any]] = {
  "gcloud": gcloud.ENGINE,
  "slurm": slurm.ENGINE,
  "sky": sky.ENGINE,
  "xpk": xpk.ENGINE,
}
