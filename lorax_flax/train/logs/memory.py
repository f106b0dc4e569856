"""Peak memory so far: the devices', or this process's where they keep no count."""

import resource
import sys

import jax


def peak() -> int:
  """Bytes of the fullest local device, or the process's largest resident set.

  A CPU's backend keeps no count: its arrays are in the process's memory.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  found = max(each.get("peak_bytes_in_use", 0) for each in stats)
  if found:
    return found
  # Kibibytes, but bytes on macOS.
  unit = 1 if sys.platform == "darwin" else 1 << 10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(size: int) -> str:
  """A number of bytes for a person."""
  return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
