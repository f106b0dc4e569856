"""Costs of a compiled step on each chip, and the roofline of its time."""

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

# The compilers' messages about a program that is too large.
_USED = (
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
  re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass(frozen=True)
class Arguments:
  """Bytes of a step's arguments on each chip, without the padding of tiles.

  Attributes:
    weights: the base, and the adapter's leaves that are not trained.
    adapter: the trained leaves.
    optimizer: the optimiser's state.
    batch: the batch, the step's number and the key.
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
  """Costs of one step, per chip; of a chip without rates, memory and collectives alone.

  Attributes:
    arguments: bytes of the arguments, by part.
    padding: bytes that the compiler's layouts add to the arguments.
    temporaries: bytes of temporaries at the moment when most is kept, above all
      activations. The compiler's `temp_size_in_bytes` is more: on a TPU it counts what
      a scan keeps twice, which neither its buffers nor its refusals do.
    code: bytes of the program itself.
    results: bytes of the results that do not replace a donated argument.
    flops: matmul FLOPs that the chip executes, recomputed ones included.
    useful: matmul FLOPs that the step needs: none recomputed, an even share per chip.
    hbm: bytes read from and written to main memory.
    sent: bytes that the chip sends, by kind of collective.
    runs: number of collectives that run, by kind.
    kernels: number of runs of attention's kernels, by name; none where attention is
      made of plain products.
    compute, memory, network: seconds that flops, hbm and sent take at the peak rates,
      with the collectives one after another.
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
  kernels: Mapping[str, int]
  compute: float
  memory: float
  network: float

  @property
  def peak(self) -> float:
    """Peak memory in bytes."""
    kept = self.arguments.total + self.padding + self.results
    return kept + self.temporaries + self.code

  @property
  def utilization(self) -> float:
    """Share of the peak FLOP/s that the needed FLOPs take (MFU)."""
    return self.compute / self.seconds * self.useful / self.flops

  @property
  def seconds(self) -> float:
    """Seconds of a step by the roofline: all three overlap, each at its peak rate."""
    return max(self.compute, self.memory, self.network)

  @property
  def bound(self) -> str:
    """Name of the longest of the three."""
    times = {
      "compute": self.compute,
      "HBM": self.memory,
      "interconnect": self.network,
    }
    return max(times, key=lambda name: times[name])


class TooLarge(LoraxError):
  """A step that does not fit into the memory of a chip.

  Attributes:
    used, available: bytes.
    compiled: true if the compiler refused it, false if the arguments alone are too
      large.
  """

  def __init__(self, used: float, available: float, compiled: bool = True):
    subject = "the step needs" if compiled else "its arguments need"
    super().__init__(
      f"{subject} at least {used / 2**30:,.2f} GiB of each chip's memory, and there are"
      f" {available / 2**30:,.2f} GiB"
    )
    self.used, self.available, self.compiled = used, available, compiled


def measure(job: Any, topology: Topology, useful: float) -> tuple[Costs, str]:
  """Compiles a step.

  Args:
    job: a `lorax_flax.jobs.abstract.Abstract`, or an object with its attributes.
    useful: FLOPs of the step on all chips, from `step.useful_flops`.

  Returns:
    Its costs, and the text of the program.

  Raises:
    TooLarge: it does not fit.
    LoraxError: the compiler refuses it for another reason.
  """
  text, memory = _compiled(job, topology)
  found = read(job, topology, useful, text, memory)
  if found.peak > topology.chip.hbm:  # A TPU's compiler has refused it already.
    raise TooLarge(found.peak, topology.chip.hbm)
  return found, text


def _compiled(job: Any, topology: Topology) -> tuple[str, Any]:
  """The text of the compiled program, and its memory analysis."""
  least = arguments(job).total
  if least > topology.chip.hbm:
    raise TooLarge(least, topology.chip.hbm, compiled=False)
  lowered = job.lower()
  try:
    with quiet():
      compiled = lowered.compile()
  except Exception as error:  # JAX's error types differ between versions.
    if too_large := _too_large(str(error)):
      raise too_large from error
    line = str(error).splitlines()[0][:500]
    raise LoraxError(f"the compiler gave up: {line}") from error
  return compiled.as_text(), compiled.memory_analysis()


def read(job: Any, topology: Topology, useful: float, text: str, memory: Any) -> Costs:
  """Costs of a compiled step; see `measure`.

  Args:
    text: the program, `compiled.as_text()`.
    memory: `compiled.memory_analysis()`.
  """
  parts, chip = arguments(job), topology.chip
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  kept = memory.argument_size_in_bytes + results
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
    temporaries=memory.peak_memory_in_bytes - kept,
    code=memory.generated_code_size_in_bytes,
    results=results,
    flops=flops,
    useful=useful / topology.size,
    hbm=moved,
    sent=sent,
    runs=runs,
    kernels=hlo.kernel_runs(text),
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
  """Bytes of a step's arguments on each chip; compiles nothing."""
  small = (job.state.step, job.state.key, job.batch)
  return Arguments(
    weights=_size(job.base),
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
