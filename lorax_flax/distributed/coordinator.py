"""The coordinator's address, which JAX keeps in a private place.

`jax.distributed` has no public way to ask for it, and where a cluster (Slurm, a TPU
pod) names the coordinator, only JAX knows. No other file imports `jax._src`.
"""

from jax._src import distributed


def host() -> str | None:
  """Host name of the coordinator as the cluster calls it; None for a single process."""
  address = distributed.global_state.coordinator_address
  return address.rpartition(":")[0] if address else None
