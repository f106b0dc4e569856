"""One process of a run on a TPU pod, without the TPU: joins, says who it is, and goes.

`python -m tests.launch.member`, with the environment that the pod's machine has.
"""

import os

import jax
from jax._src.clusters import cloud_tpu_cluster

from lorax_flax.distributed import processes

if __name__ == "__main__":
  # What JAX finds out from the machine's chips. GKE says itself that its pods have no
  # metadata to ask for.
  cloud_tpu_cluster.running_in_cloud_tpu_vm = True
  if "TPU_WORKER_ID" not in os.environ:
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)
  processes.initialize(cluster=True)
  processes.barrier("both are here")
  print(f"process {jax.process_index()} of {jax.process_count()}", flush=True)
