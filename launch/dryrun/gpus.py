"""Descriptions of GPUs for the compiler, in place of those that a driver gives.

Source: NVIDIA's white paper on the H100 SXM's architecture, and the CUDA programming
guide's table of compute capability 9.0.
"""

from typing import Any

from lorax_flax.errors import LoraxError

# Bytes of memory that a program can use, by name.
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


def devices(kind: str, hosts: int, gpus_per_host: int) -> list[Any]:
  """GPUs of some hosts, as JAX describes devices.

  Raises:
    LoraxError: JAX's plugin for CUDA is not installed.
  """
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(
      platform="cuda",
      target_config=_TARGETS[kind],
      topology=f"1x{hosts}x{gpus_per_host}",
    )
  except Exception as error:  # JAX's error types differ between versions.
    raise LoraxError(
      "compiling for GPUs needs JAX's CUDA plugin, but no GPU: pip install --no-deps"
      " jax-cuda12-plugin jax-cuda12-pjrt, in the version of jax."
      f" ({str(error).splitlines()[0][:200]})"
    ) from error
  return list(found.devices)
