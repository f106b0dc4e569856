"""GPUs that are described only, for the compiler: what a driver says of a real one.

Figures are NVIDIA's, of the H100 SXM: its architecture's white paper, and the CUDA
programming guide's table of compute capability 9.0.
"""

from typing import Any

from lorax_flax.errors import LoraxError

# Bytes of memory that a program can have, by name.
MEMORY = {"h100": 84_942_979_072}

_TARGETS = {
  "h100": """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


def devices(kind: str, hosts: int, each: int) -> list[Any]:
  """So many hosts with so many GPUs each, as JAX describes them.

  Raises:
    LoraxError: JAX's plugin for CUDA is not installed.
  """
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(
      platform="cuda", target_config=_TARGETS[kind], topology=f"1x{hosts}x{each}"
    )
  except Exception as error:  # JAX's kinds of errors differ between its versions.
    raise LoraxError(
      "compiling for GPUs needs JAX's plugin for CUDA, and no GPU:"
      " pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, of jax's own version."
      f" ({str(error).splitlines()[0][:200]})"
    ) from error
  return list(found.devices)
