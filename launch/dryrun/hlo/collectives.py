"""Collectives of a compiled program, and the bytes that they send."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from launch.dryrun.hlo import loops, program
from launch.dryrun.hlo.program import Array, Computation, Instruction

# XLA's names. Some backends start a collective in one instruction and finish it in
# another.
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
    shapes: (dtype, sizes) of each of its results on one device.
    members: the devices of one of its groups, as indices into the program's devices;
      of a permutation, those of one pair.
    times: number of runs.
    source: name of the operation that it was made for.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  members: tuple[int, ...]
  times: int
  source: str

  @property
  def group(self) -> int:
    """Number of devices in a group."""
    return len(self.members)

  @property
  def size(self) -> float:
    """Bytes of the results of one run on one device."""
    return sum(Array(dtype, dims).size for dtype, dims in self.shapes)

  @property
  def sent(self) -> float:
    """Bytes that each device sends in all runs, by the usual ring algorithms."""
    n = self.group
    share = {
      "all-gather": (n - 1) / n,
      "all-reduce": 2 * (n - 1) / n,
      "reduce-scatter": n - 1,  # The result is 1 / n of the operand.
      "all-to-all": (n - 1) / n,
    }
    return self.times * self.size * share.get(self.kind, 1.0)


def collectives(text: str) -> list[Collective]:
  """Lists every collective of a program, `compiled.as_text()`.

  A TPU's compiler may spread one collective over several fusions, each of which names
  it beside the computation that it overlaps with; it is counted where it starts.

  Raises:
    ValueError: a loop with no known trip count; device groups in an unknown form; a
      collective that is continued but never started.
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
  moved = [(int(a), int(b)) for a, b in pairs if a != b]
  return moved[0] if moved else (0, 0)


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
  # replica_groups=mesh['a'=4,'b'=2] {'a'}, with a sub-axis as 'b':(1)2.
  if named := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?P<ids>[^)]*)\))?"
    r"[^{]*\{([^}]*)\}",
    text,
  ):
    return tuple(_along(named[1], named[3], instruction))
  raise ValueError(f"device groups of an unknown form: {str(instruction)[:300]}")


def _along(mesh: str, axes: str, instruction: Instruction) -> Iterator[int]:
  """Yields the ids of a mesh's first group, which spans some of its axes."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
  dims: list[int] = []
  along: list[int] = []
  for name, size in sizes.items():
    own = [(int(before), int(n)) for a, before, n in parts if a == name and n]
    full = any(a == name and not n for a, _, n in parts)
    if not own:
      along += [len(dims)] if full else []
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
