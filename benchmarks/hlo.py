"""Matmul FLOPs and collectives of a compiled program, from the compiler's own text.

XLA's cost analysis counts a loop's body once; here it counts as often as it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
  r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\w+\[[\d,]*\]\S*) ([\w\-]+)\((.*)$"
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What multiplies matrices in a way that this file cannot count.
_OPAQUE = re.compile(r'custom_call_target="([^"]*(?:mat|gemm|conv|dot)[^"]*)"', re.I)


def matmul_flops(text: str) -> int:
  """2 × the products of every dot that runs, loops multiplied out.

  Args:
    text: of `compiled.as_text()`.

  Raises:
    ValueError: a loop with no known trip count, or a product hidden in a custom call.
  """
  return sum(times * _flops(line, shapes) for line, shapes, times in _runs(text))


# What devices do together, by the name that XLA gives it; some backends start it in one
# instruction and finish it in another.
KINDS = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: one of KINDS.
    shapes: of its results on one device, (dtype, sizes) each.
    group: how many devices do it together.
    times: how often it runs.
    source: the operation of the program that it was made for.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  group: int
  times: int
  source: str

  @property
  def size(self) -> int:
    """Bytes of the results on one device, of one run."""
    return sum(_bytes(dtype) * math.prod(dims) for dtype, dims in self.shapes)

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

  Raises:
    ValueError: a loop with no known trip count; groups in a form that is not known.
  """
  found = []
  for line, _, times in _runs(text):
    instruction = _INSTRUCTION.match(line)
    assert instruction
    kind = instruction[3].removesuffix("-start")
    if kind not in KINDS or instruction[3].endswith("-done"):
      continue
    shapes = [
      (dtype, tuple(map(int, filter(None, dims.split(",")))))
      for dtype, dims in _ARRAY.findall(instruction[2])
    ]
    if instruction[3].endswith("-start") and kind != "all-reduce":
      # Its operands, its results, and for a permute two flags.
      shapes = [shape for shape in shapes if shape != ("u32", ())]
      shapes = shapes[len(shapes) // 2 :]
    source = _SOURCE.search(line)
    group = 2 if kind == "collective-permute" else _group(line)
    name = source[1] if source else ""
    found.append(Collective(kind, tuple(shapes), group, times, name))
  return found


def _bytes(dtype: str) -> float:
  bits = _BITS.match(dtype)
  return int(bits[1]) / 8 if bits else 1  # pred


def _group(line: str) -> int:
  """How many devices are in each of an instruction's groups."""
  # replica_groups=[4,2]<=[8]: four groups of two.
  if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
    return int(counted[2])
  # replica_groups={{0,1},{2,3}}
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return len(listed[1].split(","))
  # replica_groups=mesh['a'=4,'b'=2] {'a'}, with a part of an axis as 'b':(1)2.
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  raise ValueError(f"groups of an unknown form: {line.strip()[:300]}")


def _runs(text: str) -> Iterator[tuple[str, dict[str, tuple], int]]:
  """Every line that runs, its computation's shapes, and how often it runs."""
  computations, entry = _parse(text)
  times: collections.Counter[str] = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for line in computations[name][0]:
      if called := _called(line, computations):
        each = count * _trips(line)
        for inner in called:
          visit(inner, each)

  visit(entry, 1)
  for name, count in times.items():
    lines, shapes = computations[name]
    for line in lines:
      yield line, shapes, count


def _parse(text: str) -> tuple[dict[str, tuple[list[str], dict[str, tuple]]], str]:
  """Each computation's lines and the shapes of its instructions; the entry's name."""
  computations: dict[str, tuple[list[str], dict[str, tuple]]] = {}
  entry = current = ""
  for line in text.splitlines():
    if opened := _COMPUTATION.match(line.strip()):
      current = opened[2]
      computations[current] = ([], {})
      entry = current if opened[1] else entry
    elif (found := _INSTRUCTION.match(line)) and current:
      computations[current][0].append(line)
      computations[current][1][found[1]] = _dims(found[2])
  return computations, entry


def _dims(shape: str) -> tuple[int, ...]:
  numbers = _SHAPE.match(shape)
  return tuple(map(int, filter(None, numbers[1].split(",")))) if numbers else ()


def _flops(line: str, shapes: dict[str, tuple]) -> int:
  if opaque := _OPAQUE.search(line):
    raise ValueError(f"a product in the custom call {opaque[1]!r} cannot be counted")
  found = _INSTRUCTION.match(line)
  assert found
  if found[3] == "convolution":
    raise ValueError("a convolution cannot be counted")
  if found[3] != "dot":
    return 0
  first = found[4].split(",")[0].split(")")[0]
  # Some versions write an operand's shape before its name, with commas inside.
  inline = _SHAPE.match(found[4].strip())
  name = re.findall(r"%?([\w.\-]+)", first)[-1]
  left = _dims(found[4].strip()) if inline else shapes[name]
  numbers = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
  assert numbers
  contracted = [left[int(i)] for i in numbers[1].split(",") if i]
  return 2 * math.prod(_dims(found[2])) * math.prod(contracted)


def _trips(line: str) -> int:
  found = _INSTRUCTION.match(line)
  if found is None or found[3] != "while":
    return 1
  known = _TRIPS.search(line)
  if not known:
    raise ValueError(f"a loop with no known trip count: {line.strip()[:200]}")
  return int(known[1])


def _called(line: str, computations) -> list[str]:
  groups = [many or one for many, one in _CALLED.findall(line)]
  names = [name.strip().lstrip("%") for group in groups for name in group.split(",")]
  return [name for name in names if name in computations]
