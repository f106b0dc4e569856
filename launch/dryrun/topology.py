"""Slices that are described only: their chips' figures, and how these are wired.

Figures are the vendor's, per chip: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}
(peak bfloat16 FLOP/s, HBM size and bandwidth, bandwidth between chips), and the number
of links: 3-D tori (v4, v5p) have six a chip, 2-D ones (v5e, v6e) four. v4's bandwidth
between chips, 50 GB/s a link and direction, is of arXiv 2304.01433, table 4.
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
from lorax_flax.errors import LoraxError, unknown

GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
  """What one chip can do.

  Attributes:
    hbm: bytes of memory.
    flops: bfloat16 FLOP/s at its peak.
    hbm_bandwidth: bytes/s.
    link: bytes/s that one link carries in one direction.
    dims: of the torus that links make; of GPUs, hosts and GPUs of each.
    wraps: chips along an axis at which its ends are joined: a multiple of it (and on a
      3-D torus, of every axis).
    most: chips of the largest slice.
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
    """Whether there are rates to reckon times from."""
    return self.flops > 0


CHIPS = {
  "v4": Chip(32 * GIB, 275e12, 1.2e12, 50e9, dims=3, wraps=4, most=4096),
  "v5e": Chip(16 * GIB, 197e12, 0.819e12, 50e9, dims=2, wraps=16, most=256),
  "v5p": Chip(95 * GIB, 459e12, 2.765e12, 100e9, dims=3, wraps=4, most=6144),
  "v6e": Chip(32 * GIB, 918e12, 1.638e12, 100e9, dims=2, wraps=16, most=256),
  # For memory alone: without a GPU its compiler tries no kernels out, so that the
  # program is not the one that would run.
  "h100": Chip(gpus.MEMORY["h100"], 0, 0, 0, dims=2, wraps=0, most=4096),
}
# Chips of a host, along each axis; a smaller slice lies on a part of one.
_HOST = (2, 2, 1)


@dataclass(frozen=True)
class Topology:
  """A slice.

  Attributes:
    name: "v5e:4x4".
    chip: one of its chips.
    shape: chips along each axis of the network.
    devices: as JAX describes them, one a chip.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: Sequence[Any]

  @property
  def size(self) -> int:
    """How many chips."""
    return len(self.devices)

  def links(self, members: Sequence[Any]) -> float:
    """Links, each in one direction, that a group of devices can send over at once.

    A ring needs one each way: two where the ends of an axis are joined, else one. A
    group that spreads over several axes uses those of each.
    """
    coords = [tuple(device.coords) for device in members]
    found = 0
    for axis, size in enumerate(self.shape):
      along = {c[axis] for c in coords}
      if len(along) > 1:
        found += 2 if len(along) == size and self._joined(size) else 1
    return found or 1

  def _joined(self, size: int) -> bool:
    whole = self.chip.wraps
    every = self.shape if self.chip.dims == 3 else (size,)
    return all(n % whole == 0 for n in every)


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """The generation and the shape of "v5e:4x4".

  Raises:
    LoraxError: no such generation, or no such slice of it.
  """
  kind, colon, text = name.partition(":")
  if kind not in CHIPS:
    raise LoraxError(unknown("kind of chip", kind, CHIPS))
  chip = CHIPS[kind]
  example = f"{kind}:{'x'.join(['4'] * chip.dims)}" if chip.timed else f"{kind}:2x8"
  if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
    raise LoraxError(f"topology {name!r}: write it like {example}")
  shape = tuple(map(int, text.split("x")))
  if not chip.timed:
    shape = (1, *shape)[-2:] if len(shape) < 3 else shape
  if len(shape) != chip.dims:
    what = f"a {kind}'s network has {chip.dims} axes"
    if not chip.timed:
      what = "GPUs are so many of one host, or hosts × GPUs of each"
    raise LoraxError(f"topology {name!r}: {what}, as in {example}")
  if math.prod(shape) > chip.most:
    raise LoraxError(
      f"topology {name!r} has {math.prod(shape)} chips, and a {kind} slice at most"
      f" {chip.most}"
    )
  return kind, shape


def describe(name: str) -> Topology:
  """A slice by name, without any of its chips.

  Raises:
    LoraxError: no such slice; libtpu is not installed.
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
    # A chip's two cores as one device, as training on it has them.
    options["chip_config_name"] = "megacore"
  whole = (*shape, 1)[:3]
  if math.prod(whole) < math.prod(_HOST):
    options["chips_per_host_bounds"] = whole
  try:
    with quiet():
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **options
      )
  except Exception as error:  # JAX's kinds of errors differ between its versions.
    raise LoraxError(
      f"topology {name!r}: {str(error).splitlines()[0][:300]}"
    ) from error
  return Topology(name, chip, shape, found.devices)


def prepare(chip: Chip) -> None:
  """Sets up JAX to compile for what is not there, before it looks for devices.

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
  # Two processes may compile at once; nothing asks the cloud what this machine is.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Withholds what libtpu's C++ writes to standard error: its errors are raised too."""
  sys.stderr.flush()
  before = os.dup(2)
  with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(before, 2)
    os.close(before)
