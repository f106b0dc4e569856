"""What the devices of a compiled program send one another."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from launch.dryrun.hlo import loops, program
from launch.dryrun.hlo.program import Array, Computation, Instruction

# What devices do together, by the name that XLA gives it; some backends start it in one
# instruction and finish it in another.
KINDS = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: one of KINDS.
    shapes: of its results on one device, (dtype, sizes) each.
    members: the devices of one of its groups, as places in the program's order; of a
      permutation, those of one pair.
    times: how often it runs.
    source: the operation of the program that it was made for.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  members: tuple[int, ...]
  times: int
  source: str

  @property
  def group(self) -> int:
    """How many devices do it together."""
    return len(self.members)

  @property
  def size(self) -> float:
    """Bytes of the results on one device, of one run."""
    return sum(Array(dtype, dims).size for dtype, dims in self.shapes)

  @property
  def sent(self) -> float:
    """Bytes that each device sends in all runs, by the usual ring algorithms."""
    n = self.group
    share = {
      "all-gather": (n - 1) / n,
      "all-reduce": 2 * (n - 1) / n,
      "reduce-scatter": n - 1,  # The result is an n-th of what goes in.
      "all-to-all": (n - 1) / n,
    }
    return self.times * self.size * share.get(self.kind, 1.0)


def collectives(text: str) -> list[Collective]:
  """Every collective of a program, `compiled.as_text()`.

  A TPU's compiler spreads one over several fusions, each of which names it again
  beside what is computed meanwhile; it counts where it starts.

  Raises:
    ValueError: a loop with no known trip count; groups in a form that is not known; a
      collective that goes on but was never started.
  """
  parsed = program.parse(text)
  runs = loops.count(parsed).all
  found, chains, started = [], set(), set()
  for name, times in runs.items():
    computation = parsed.computations[name]
    starts = _starts(computation)
    for instruction in computation.instructions.values():
      kind = instruction.op.removesuffix("-start")
      if kind not in KINDS or instruction.op.endswith("-done"):
        continue
      if "async_collective_fusion_config" in instruction.attributes:
        chain = instruction.attribute("channel_id")
        chains.add(chain)
        if not starts:
          continue
        started.add(chain)
      found.append(_read(kind, instruction, times))
  if lost := chains - started:
    raise ValueError(f"collectives that never start: channels {sorted(map(str, lost))}")
  return found


def _starts(computation: Computation) -> bool:
  return any(
    '"AsyncCollectiveStart"' in i.attributes
    for i in computation.instructions.values()
    if i.op == "custom-call"
  )


def _read(kind: str, instruction: Instruction, times: int) -> Collective:
  shapes = [(a.dtype, a.dims) for a in instruction.arrays]
  if instruction.op.endswith("-start") and kind != "all-reduce":
    # Its operands, its results, and for a permute two flags.
    shapes = [shape for shape in shapes if shape != ("u32", ())]
    shapes = shapes[len(shapes) // 2 :]
  source = _SOURCE.search(instruction.attributes)
  if kind in ("collective-permute", "collective-broadcast"):
    members = _pair(instruction)
  else:
    members = _members(instruction)
  name = source[1] if source else ""
  return Collective(kind, tuple(shapes), members, times, name)


def _pair(instruction: Instruction) -> tuple[int, ...]:
  pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes)
  apart = [(int(a), int(b)) for a, b in pairs if a != b]
  return apart[0] if apart else (0, 0)


def _members(instruction: Instruction) -> tuple[int, ...]:
  """The devices in the first of an instruction's groups."""
  text = instruction.attributes
  # replica_groups=[4,2]<=[2,4]T(1,0): four groups of two, of all ids so transposed.
  if made := re.search(
    r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  ):
    dims = _numbers(made[3])
    ids = np.arange(math.prod(dims)).reshape(dims)
    if made[4]:
      ids = ids.transpose(_numbers(made[4]))
    return tuple(map(int, ids.reshape(int(made[1]), int(made[2]))[0]))
  # replica_groups={{0,1},{2,3}}
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return tuple(_numbers(listed[1]))
  # replica_groups=mesh['a'=4,'b'=2] {'a'}, with a part of an axis as 'b':(1)2.
  if named := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?P<ids>[^)]*)\))?"
    r"[^{]*\{([^}]*)\}",
    text,
  ):
    return tuple(_along(named[1], named[3], instruction))
  raise ValueError(f"groups of an unknown form: {str(instruction)[:300]}")


def _along(mesh: str, axes: str, instruction: Instruction) -> Iterator[int]:
  """The ids that a mesh's first group has: those along some of its axes."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
  dims: list[int] = []
  along: list[int] = []
  for name, size in sizes.items():
    own = [(int(before), int(n)) for a, before, n in parts if a == name and n]
    whole = any(a == name and not n for a, _, n in parts)
    if not own:
      along += [len(dims)] if whole else []
      dims.append(size)
      continue
    # 'b':(before)n is the middle of before × n × rest.
    before, n = own[0]
    along.append(len(dims) + 1)
    dims += [before, n, size // before // n]
  ids = np.arange(math.prod(dims)).reshape(dims)
  first = ids[tuple(slice(None) if i in along else 0 for i in range(len(dims)))]
  yield from map(int, first.reshape(-1))


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]
