"""Suggestions: meshes, remat policies and batch sizes for a run on a slice, ranked."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.dryrun import costs, report
from launch.dryrun import step as shapes
from launch.dryrun.options import Option, meshes
from launch.dryrun.topology import Topology
from lorax_flax import text_table
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.abstract import abstract
from lorax_flax.jobs.settings import Settings
from lorax_flax.models.remat import REMAT
from lorax_flax.sharding import activations
from lorax_flax.sharding.mesh import AXES

# Number of the best meshes whose other options are tried.
_BEST = 2


@dataclass(frozen=True)
class Tried:
  """An option and its result.

  Attributes:
    costs: None if it does not fit.
    used: bytes of a chip's memory.
    rate: tokens per second and chip, by the roofline; 0 if it does not fit.
    compiled: false if the arguments alone are too large, so that it was not compiled.
  """

  option: Option
  costs: costs.Costs | None
  used: float
  rate: float = 0.0
  compiled: bool = True


def run(settings: Settings, topology: Topology, title: str, *, minutes: float) -> None:
  """Tries options, and prints them with the fastest first.

  Args:
    minutes: after these, no further compilation is started.

  Raises:
    LoraxError: no option suits the batch, or the chip's rates are not known.
  """
  if not topology.chip.timed:
    raise LoraxError(f"--suggest ranks by time, which is not computed for {title}")
  until = time.monotonic() + 60 * minutes
  tried: list[Tried] = []
  left, useful = 0, shapes.useful_flops(settings, topology)
  first = [
    Option(mesh, settings.model.remat, settings.train.batch_size)
    for mesh in meshes(topology.size, *shapes.sharded(settings))
  ]
  for stage in (lambda: first, lambda: list(_around(settings, tried))):
    options = stage()
    for number, option in enumerate(options, 1):
      if time.monotonic() > until:
        left += len(options) - number + 1
        break
      name = f"{number} of {len(options)}: {option}"
      if any(option.needs_more_than(t.option) for t in tried if not t.costs):
        continue
      with report.spinner(name):
        found = _try(option, settings, topology, useful)
      if found is None:
        continue
      tried.append(found)
      print(f"  {name}: {_outcome(found)}", flush=True)
  if not tried:
    raise LoraxError(
      f"no mesh of {topology.size} chips suits a batch of {settings.train.batch_size}"
    )
  print(f"\n{table(title, tried, topology)}")
  if left:
    print(f"{left} others were not tried: --minutes={minutes:g} had passed")


def _around(settings: Settings, tried: Sequence[Tried]) -> Iterator[Option]:
  """Yields other remat policies and batch sizes on the best meshes so far."""
  best = sorted(tried, key=lambda t: (-t.rate, t.used))[:_BEST]
  for found in best:
    mesh, batch = found.option.mesh, settings.train.batch_size
    for size in (batch, 2 * batch, 4 * batch, batch // 2):
      for remat in reversed(REMAT):
        option = Option(mesh, remat, size)
        if option != found.option and size:
          yield option


def _try(
  option: Option, settings: Settings, topology: Topology, useful: float
) -> Tried | None:
  """Compiles an option; None if its mesh does not divide the batch.

  Args:
    useful: FLOPs of the settings' own batch; others need more in proportion.
  """
  if option.batch % (
    activations.num_shards(option.sizes) * settings.train.accumulation
  ):
    return None
  job = abstract(option.of(settings), topology.devices)
  needed = useful * option.batch / settings.train.batch_size
  try:
    found, _ = costs.measure(job, topology, needed)
  except costs.TooLarge as error:
    return Tried(option, None, error.used, compiled=error.compiled)
  tokens = math.prod(job.batch["input_ids"].shape)
  return Tried(option, found, found.peak, tokens / found.seconds / topology.size)


def _outcome(found: Tried) -> str:
  if found.costs is None:
    more = "" if found.compiled else " of arguments alone"
    return f"does not fit: {report.size(found.used)}{more}"
  return f"{found.rate:,.0f} tokens/s a chip, {report.size(found.used)}"


def table(title: str, tried: Sequence[Tried], topology: Topology) -> str:
  """The options that fit, the fastest first, then those that do not."""
  rows = []
  for found in sorted(tried, key=lambda t: (not t.costs, -t.rate, t.used)):
    option, c = found.option, found.costs
    cells = ("×".join(map(str, option.mesh)), option.remat, option.batch)
    least = "" if found.compiled else "> "
    used = f"{least}{found.used / 2**30:.2f}"
    if c is None:
      rows.append((*cells, "", "", "", "", used, "no"))
      continue
    times = (f"{found.rate:,.0f}", report.time(c.seconds), c.bound)
    share = f"{found.used / topology.chip.hbm:.0%}"
    rows.append((*cells, *times, f"{c.utilization:.0%}", used, share))
  columns = ("mesh", "remat", "batch", "tokens/s", "step", "bound", "MFU", "GiB")
  table = text_table.render(
    (*columns, "of it"),
    rows,
    align="lrrrrrrrr",
    title=f"{title}: per chip, by the roofline",
  )
  return f"{table}\nmesh: {' × '.join(AXES)}; GiB: the peak of HBM"
