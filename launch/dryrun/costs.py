"""What a compiled step costs on each chip, and a roofline of its time."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from launch.dryrun import hlo
from launch.dryrun.topology import Topology, quiet
from lorax_flax.errors import LoraxError
from lorax_flax.methods import Tuned

# What the compiler says of a program that is too large, in each of its ways.
_USED = (
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
  re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass(frozen=True)
class Arguments:
  """Bytes on each chip of what a step takes, without the padding of tiles.

  Attributes:
    weights: of the base, and untrained parts of the adapter.
    adapter: what is trained.
    optimizer: the optimiser's state.
    batch: the batch, and what else is small.
  """

  weights: float
  adapter: float
  optimizer: float
  batch: float

  @property
  def total(self) -> float:
    return self.weights + self.adapter + self.optimizer + self.batch


@dataclass(frozen=True)
class Costs:
  """Of one step, per chip. Of a chip without rates, memory and collectives alone.

  Attributes:
    arguments: bytes by part, as they are.
    padding: bytes that the compiler's layouts add to them.
    temporaries: bytes of all that a step computes and forgets: activations above all.
    code: bytes of the program itself.
    results: bytes of results that take no argument's place.
    flops: of the matrix products that the chip does, recomputed ones too.
    useful: those that the step needs: nothing recomputed, cut evenly over the chips.
    hbm: bytes to and from memory.
    sent: bytes that the chip sends, by kind of collective.
    runs: how many collectives of each kind run.
    compute, memory, network: seconds that flops, hbm and sent take at the peak rates;
      collectives one after another.
  """

  arguments: Arguments
  padding: float
  temporaries: float
  code: float
  results: float
  flops: float
  useful: float
  hbm: float
  sent: Mapping[str, float]
  runs: Mapping[str, int]
  compute: float
  memory: float
  network: float

  @property
  def peak(self) -> float:
    """Bytes of memory in use at most."""
    taken = self.arguments.total + self.padding + self.results
    return taken + self.temporaries + self.code

  @property
  def utilization(self) -> float:
    """Of the chip's peak, by the FLOPs that the step needs (MFU)."""
    return self.compute / self.seconds * self.useful / self.flops

  @property
  def seconds(self) -> float:
    """Of a step, by the roofline: all three at once, each at its peak rate."""
    return max(self.compute, self.memory, self.network)

  @property
  def bound(self) -> str:
    """What takes that long."""
    times = {
      "compute": self.compute,
      "HBM": self.memory,
      "interconnect": self.network,
    }
    return max(times, key=lambda name: times[name])


class TooLarge(LoraxError):
  """The step does not fit into the memory of a chip.

  Attributes:
    used, available: bytes.
    compiled: whether the compiler says so; else the arguments alone are too large.
  """

  def __init__(self, used: float, available: float, compiled: bool = True):
    what = "the step needs" if compiled else "what the step takes needs"
    super().__init__(
      f"{what} at least {used / 2**30:,.2f} GiB of each chip's memory, and there are"
      f" {available / 2**30:,.2f} GiB"
    )
    self.used, self.available, self.compiled = used, available, compiled


def measure(job: Any, topology: Topology, useful: float) -> tuple[Costs, str]:
  """Compiles a step and reads its costs; also the program's text.

  Args:
    job: an `lorax_flax.jobs.abstract.Abstract`, or what is like it.
    useful: FLOPs of the step on all chips, as `shapes.useful_flops` finds them.

  Raises:
    TooLarge: it does not fit.
    LoraxError: the compiler refuses it for another reason.
  """
  text, memory = _compiled(job, topology)
  found = read(job, topology, useful, text, memory)
  if found.peak > topology.chip.hbm:  # A TPU's compiler has said so before.
    raise TooLarge(found.peak, topology.chip.hbm)
  return found, text


def _compiled(job: Any, topology: Topology) -> tuple[str, Any]:
  """The program's text, and how it lays out memory."""
  least = arguments(job).total
  if least > topology.chip.hbm:
    raise TooLarge(least, topology.chip.hbm, compiled=False)
  lowered = job.lower()
  try:
    with quiet():
      compiled = lowered.compile()
  except Exception as error:  # JAX's kinds of errors differ between its versions.
    if too_large := _too_large(str(error)):
      raise too_large from error
    line = str(error).splitlines()[0][:500]
    raise LoraxError(f"the compiler gave up: {line}") from error
  return compiled.as_text(), compiled.memory_analysis()


def read(job: Any, topology: Topology, useful: float, text: str, memory: Any) -> Costs:
  """The costs of a compiled step; see `measure`.

  Args:
    text: of the program.
    memory: as `memory_analysis()` of the compiled step gives it.
  """
  parts, chip = arguments(job), topology.chip
  sent: dict[str, float] = defaultdict(float)
  runs: Counter[str] = Counter()
  network = 0.0
  devices = list(job.mesh.devices.flat)
  for c in hlo.collectives(text):
    sent[c.kind] += c.sent
    runs[c.kind] += c.times
    if chip.timed:
      network += c.sent / (topology.links([devices[i] for i in c.members]) * chip.link)
  flops = hlo.matmul_flops(text) if chip.timed else 0
  moved = hlo.hbm_bytes(text) if chip.timed else 0.0
  return Costs(
    arguments=parts,
    padding=max(0.0, memory.argument_size_in_bytes - parts.total),
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    flops=flops,
    useful=useful / topology.size,
    hbm=moved,
    sent=sent,
    runs=runs,
    compute=flops / chip.flops if chip.timed else 0.0,
    memory=moved / chip.hbm_bandwidth if chip.timed else 0.0,
    network=network,
  )


def _too_large(message: str) -> TooLarge | None:
  for pattern in _USED:
    if found := pattern.search(message):
      used = float(found[1]) * _UNITS[found[2]]
      return TooLarge(used, float(found[3]) * _UNITS[found[4]])
  return None


def arguments(job: Any) -> Arguments:
  """Bytes on each chip of a step's arguments; nothing is compiled."""
  small = (job.state.step, job.state.key, job.batch)
  # What a weight that trains in full started from lies in the base's own buffer.
  rest = {p: d for p, d in job.base.rest.items() if not isinstance(d, Tuned)}
  return Arguments(
    weights=_size((job.base.params, rest)),
    adapter=_size(job.state.trained),
    optimizer=_size(job.state.opt_state),
    batch=_size(small),
  )


def _size(tree: Any) -> float:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x.dtype)
    for x in jax.tree.leaves(tree)
  )


def _itemsize(dtype: Any) -> float:
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return 8.0
  bits = jax.dtypes.itemsize_bits(dtype)
  return bits / 8
