"""Meshes, remat policies and batch sizes for a run on a slice, ranked."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import table as rich_table

from launch.dryrun import costs, report
from launch.dryrun import step as shapes
from launch.dryrun.topology import Topology
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.settings import Settings
from lorax_flax.sharding import activations as spread
from lorax_flax.sharding.mesh import AXES, MeshConfig, spell

# What is recomputed, from the most memory to the least.
_REMAT = ("none", "dots", "full")
# Meshes whose other options are tried.
_BEST = 2


@dataclass(frozen=True)
class Option:
  """One way to run.

  Attributes:
    mesh: chips along each of its axes.
    remat, batch: model.remat and train.batch_size.
  """

  mesh: tuple[int, ...]
  remat: str
  batch: int

  @property
  def sizes(self) -> dict[str, int]:
    """Of the mesh's axes, by name."""
    return dict(zip(AXES, self.mesh, strict=True))

  def of(self, wanted: Settings) -> Settings:
    """The settings with this option."""
    return dataclasses.replace(
      wanted,
      mesh=MeshConfig(**self.sizes),
      model=dataclasses.replace(wanted.model, remat=self.remat),
      train=dataclasses.replace(
        wanted.train, batch_size=self.batch, eval_batch_size=self.batch
      ),
    )

  def needs_more_than(self, other: "Option") -> bool:
    """Whether it takes at least the memory of another one on the same mesh."""
    return (
      self.mesh == other.mesh
      and self.batch >= other.batch
      and _REMAT.index(self.remat) <= _REMAT.index(other.remat)
    )


@dataclass(frozen=True)
class Tried:
  """An option, and what came of it.

  Attributes:
    costs: None where it does not fit.
    used: bytes of a chip's memory.
    rate: tokens per second and chip, by the roofline; 0 where it does not fit.
    compiled: whether that is the compiler's word, and not the arguments' size alone.
  """

  option: Option
  costs: costs.Costs | None
  used: float
  rate: float = 0.0
  compiled: bool = True


def run(wanted: Settings, topology: Topology, title: str, *, minutes: float) -> None:
  """Tries options for so long, and prints them, the fastest first.

  Raises:
    LoraxError: no option suits the batch, or there are no rates to rank them by.
  """
  if not topology.chip.timed:
    raise LoraxError(f"--suggest ranks by time, which is not reckoned of {title}")
  until = time.monotonic() + 60 * minutes
  tried: list[Tried] = []
  left, useful = 0, shapes.useful_flops(wanted, topology)
  first = [
    Option(mesh, wanted.model.remat, wanted.train.batch_size)
    for mesh in meshes(topology.size, shapes.experts(wanted))
  ]
  for stage in (lambda: first, lambda: list(_around(wanted, tried))):
    options = stage()
    for number, option in enumerate(options, 1):
      if time.monotonic() > until:
        left += len(options) - number + 1
        break
      what = f"{number} of {len(options)}: {describe(option)}"
      if any(option.needs_more_than(t.option) for t in tried if not t.costs):
        continue
      with report.working(what):
        found = _try(option, wanted, topology, useful)
      if found is None:
        continue
      tried.append(found)
      report.show(f"  {what}: {_outcome(found)}")
  if not tried:
    raise LoraxError(
      f"no mesh of {topology.size} chips suits a batch of {wanted.train.batch_size}"
    )
  report.show("", table(title, tried, topology))
  if left:
    report.show(f"{left} others were not tried: --minutes={minutes:g} had passed")


def meshes(chips: int, experts: int = 1) -> list[tuple[int, ...]]:
  """Every way to cut so many chips, those first that are likely to be good.

  Args:
    experts: of the model, which their axis has to divide.
  """
  found = [
    (data, fsdp, chips // expert // data // fsdp, expert)
    for expert in _divisors(math.gcd(chips, experts))
    for data in _divisors(chips // expert)
    for fsdp in _divisors(chips // expert // data)
  ]
  return sorted(found, key=lambda sizes: (sizes[0], sizes[2], sizes[3]))


def _divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]


def _around(wanted: Settings, tried: Sequence[Tried]) -> Iterator[Option]:
  """Other remat policies and batch sizes, on the best of the meshes that were tried."""
  best = sorted(tried, key=lambda t: (-t.rate, t.used))[:_BEST]
  for found in best:
    mesh, batch = found.option.mesh, wanted.train.batch_size
    for size in (batch, 2 * batch, 4 * batch, batch // 2):
      for remat in reversed(_REMAT):
        option = Option(mesh, remat, size)
        if option != found.option and size:
          yield option


def _try(
  option: Option, wanted: Settings, topology: Topology, useful: float
) -> Tried | None:
  """What an option costs; None where the batch can't be spread over its mesh.

  Args:
    useful: FLOPs of the wanted batch; another one needs more in proportion.
  """
  settings = option.of(wanted)
  if option.batch % (spread.ways(option.sizes) * settings.train.accumulation):
    return None
  job = shapes.job(settings, topology)
  needed = useful * option.batch / wanted.train.batch_size
  try:
    found, _ = costs.measure(job, topology, needed)
  except costs.TooLarge as error:
    return Tried(option, None, error.used, compiled=error.compiled)
  tokens = math.prod(job.batch["input_ids"].shape)
  return Tried(option, found, found.peak, tokens / found.seconds / topology.size)


def describe(option: Option) -> str:
  mesh = spell(option.sizes) or "one chip"
  return f"{mesh}, remat {option.remat}, batch {option.batch}"


def _outcome(found: Tried) -> str:
  if found.costs is None:
    more = "" if found.compiled else ", of arguments alone"
    return f"does not fit, {report.size(found.used)}{more}"
  return f"{found.rate:,.0f} tokens/s a chip, {report.size(found.used)}"


def table(title: str, tried: Sequence[Tried], topology: Topology) -> rich_table.Table:
  """The options, those that fit first, the fastest first."""
  made = rich_table.Table(
    title=f"{title}: per chip, by the roofline",
    title_justify="left",
    caption=f"mesh: {' × '.join(AXES)}; GiB: the peak of HBM",
    caption_justify="left",
  )
  made.add_column("mesh", no_wrap=True)
  columns = ("remat", "batch", "tokens/s", "step", "bound", "MFU", "GiB", "of it")
  for name in columns:
    made.add_column(name, justify="right")
  for found in sorted(tried, key=lambda t: (not t.costs, -t.rate, t.used)):
    option, c = found.option, found.costs
    cells = ("×".join(map(str, option.mesh)), option.remat, str(option.batch))
    least = "" if found.compiled else "> "
    used = f"{least}{found.used / 2**30:.2f}"
    if c is None:
      made.add_row(*cells, "", "", "", "", used, "no")
      continue
    made.add_row(
      *cells,
      f"{found.rate:,.0f}",
      report.time(c.seconds),
      c.bound,
      f"{c.utilization:.0%}",
      used,
      f"{found.used / topology.chip.hbm:.0%}",
    )
  return made
