"""Matmul FLOPs of a compiled program, read from the compiler's own text.

XLA's cost analysis counts a loop's body once; here it counts as often as it runs.
"""

import math
import re

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
  computations, entry = _parse(text)
  memo: dict[str, int] = {}

  def count(name: str) -> int:
    if name not in memo:
      memo[name] = sum(_flops(line, computations[name][1]) for line in lines(name))
      for line in lines(name):
        times = _trips(line)
        memo[name] += times * sum(count(c) for c in _called(line, computations))
    return memo[name]

  def lines(name: str) -> list[str]:
    return computations[name][0]

  return count(entry)


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
