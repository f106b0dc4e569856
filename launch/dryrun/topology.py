"""Slices that need not exist: the rates of their chips, and the network between them.

Sources, per chip: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}
(peak bfloat16 FLOP/s, HBM size and bandwidth, bandwidth between chips), and the number
of links: 3-D tori (v4, v5p) have six a chip, 2-D ones (v5e, v6e) four. v4's bandwidth
between chips, 50 GB/s a link and direction, is from arXiv 2304.01433, table 4.
"""

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launch.dryrun import gpus
from lorax_flax.errors import LoraxError, check_known

GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
  """One chip's memory and peak rates, and its network.

  Attributes:
    hbm: bytes of memory.
    flops: peak bfloat16 FLOP/s.
    hbm_bandwidth: bytes/s.
    link: bytes/s of one link in one direction.
    dims: number of axes of the torus; of GPUs 2, hosts and GPUs of each.
    wraps: an axis whose number of chips is a multiple of this is a ring (on a 3-D
      torus, if all axes are multiples).
    most: number of chips of the largest slice.
  """

  hbm: float
  flops: float
  hbm_bandwidth: float
  link: float
  dims: int
  wraps: int
  most: int

  @property
  def timed(self) -> bool:
    """True if the rates are known, so that times can be computed."""
    return self.flops > 0


CHIPS = {
  "v4": Chip(32 * GIB, 275e12, 1.2e12, 50e9, dims=3, wraps=4, most=4096),
  "v5e": Chip(16 * GIB, 197e12, 0.819e12, 50e9, dims=2, wraps=16, most=256),
  "v5p": Chip(95 * GIB, 459e12, 2.765e12, 100e9, dims=3, wraps=4, most=6144),
  "v6e": Chip(32 * GIB, 918e12, 1.638e12, 100e9, dims=2, wraps=16, most=256),
  # For memory alone: without a GPU the compiler does not autotune, so that the program
  # is not the one that would run.
  "h100": Chip(gpus.MEMORY["h100"], 0, 0, 0, dims=2, wraps=0, most=4096),
}
# Chips of a host along each axis; a smaller slice is a part of a host.
_HOST = (2, 2, 1)


@dataclass(frozen=True)
class Topology:
  """A slice.

  Attributes:
    name: "v5e:4x4".
    chip: its kind of chip.
    shape: number of chips along each axis of the network.
    devices: JAX's description of each chip.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: Sequence[Any]

  @property
  def size(self) -> int:
    """Number of chips."""
    return len(self.devices)

  def links(self, members: Sequence[Any]) -> float:
    """Number of links, each in one direction, that a device of a group can use at once.

    Two along an axis that is a ring, else one; a group that spans several axes uses
    the links of each.
    """
    coords = [tuple(device.coords) for device in members]
    found = 0
    for axis, size in enumerate(self.shape):
      along = {c[axis] for c in coords}
      if len(along) > 1:
        found += 2 if len(along) == size and self._is_ring(size) else 1
    return found or 1

  def _is_ring(self, size: int) -> bool:
    sizes = self.shape if self.chip.dims == 3 else (size,)
    return all(n % self.chip.wraps == 0 for n in sizes)


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """Generation and shape of "v5e:4x4".

  Raises:
    LoraxError: unknown generation, or it has no such slice.
  """
  kind, colon, text = name.partition(":")
  check_known("kind of chip", kind, CHIPS)
  chip = CHIPS[kind]
  example = f"{kind}:{'x'.join(['4'] * chip.dims)}" if chip.timed else f"{kind}:2x8"
  if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
    raise LoraxError(f"topology {name!r}: write it like {example}")
  shape = tuple(map(int, text.split("x")))
  if not chip.timed:
    shape = (1, *shape)[-2:] if len(shape) < 3 else shape
  if len(shape) != chip.dims:
    rule = f"a {kind}'s network has {chip.dims} axes"
    if not chip.timed:
      rule = "give the GPUs of one host, or hosts × GPUs of each"
    raise LoraxError(f"topology {name!r}: {rule}, as in {example}")
  if math.prod(shape) > chip.most:
    raise LoraxError(
      f"topology {name!r} has {math.prod(shape)} chips, and a {kind} slice at most"
      f" {chip.most}"
    )
  return kind, shape


def describe(name: str) -> Topology:
  """A slice by name; needs none of its chips.

  Raises:
    LoraxError: no such slice; libtpu or JAX's CUDA plugin is not installed.
  """
  kind, shape = parse(name)
  chip = CHIPS[kind]
  prepare(chip)
  if not chip.timed:
    with quiet():
      return Topology(name, chip, shape, gpus.devices(kind, *shape))
  from jax.experimental import topologies

  options: dict[str, Any] = {}
  if kind == "v4":
    # One device for a chip's two cores, as on a real v4.
    options["chip_config_name"] = "megacore"
  bounds = (*shape, 1)[:3]
  if math.prod(bounds) < math.prod(_HOST):
    options["chips_per_host_bounds"] = bounds
  try:
    with quiet():
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **options
      )
  except Exception as error:  # JAX's error types differ between versions.
    raise LoraxError(
      f"topology {name!r}: {str(error).splitlines()[0][:300]}"
    ) from error
  return Topology(name, chip, shape, found.devices)


def prepare(chip: Chip) -> None:
  """Sets JAX up to compile for absent chips, before it looks for devices.

  Raises:
    LoraxError: libtpu is not installed.
  """
  import importlib.util

  import jax

  jax.config.update("jax_platforms", "cpu")
  if not chip.timed:
    return
  if importlib.util.find_spec("libtpu") is None:
    raise LoraxError(
      "compiling for TPUs needs libtpu, which is not installed:"
      " pip install 'lorax-flax[tpu]'"
    )
  # Lets two processes compile at once, and keeps libtpu from querying the cloud.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Discards what libtpu's C++ writes to standard error; its errors are also raised."""
  sys.stderr.flush()
  before = os.dup(2)
  with open(os.devnull, "w") as null:
    os.dup2(null.fileno(), 2)
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(before, 2)
    os.close(before)
