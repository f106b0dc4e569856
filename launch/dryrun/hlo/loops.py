"""Number of runs of each computation of a program, its loops multiplied out."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch.dryrun.hlo.program import Computation, Instruction, Program

# Operations whose computations are scheduled as steps of the program, unlike those of a
# fusion or a reduction.
_CONTROL = frozenset({"while", "conditional", "call", "async-start"})
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = frozenset({"copy", "bitcast", "copy-done", "convert", "reshape"})


@dataclass(frozen=True)
class Runs:
  """Number of runs by a computation's name.

  Attributes:
    all: every computation.
    control: the entry, loops and branches alone, whose instructions are scheduled.
  """

  all: Counter[str]
  control: Counter[str]


# A known integer; a tuple, as a function of the index to a value; or unknown.
Value = int | Callable[[int], Any] | None
Values = Callable[[int], Value]


def count(program: Program) -> Runs:
  """Counts runs from the entry.

  Raises:
    ValueError: a loop whose trip count can't be found.
  """
  runs = Runs(Counter(), Counter())

  def visit(name: str, times: int, argument: Value, control: bool) -> None:
    runs.all[name] += times
    if control:
      runs.control[name] += times
    computation = program.computations[name]
    for instruction in computation.instructions.values():
      called = program.called(instruction)
      if not called:
        continue
      inner = control and instruction.op in _CONTROL
      if instruction.op != "while":
        for other in called:
          visit(other, times, None, inner)
        continue
      start = _value(program, computation, instruction.operands[0], _only(argument))
      trips = _trips(program, instruction, start)
      body = program.computations[instruction.attribute("body") or ""]
      kept = _kept(program, body, start)
      for other in called:
        visit(other, times * trips, kept, inner)

  visit(program.entry, 1, None, True)
  return runs


def _only(argument: Value) -> Values:
  """Parameters of a computation that takes one."""
  return lambda number: argument if number == 0 else None


def _kept(program: Program, body: Computation, start: Value) -> Value:
  """The elements of a loop's carry that every trip leaves as they are."""

  def element(index: int) -> Value:
    after = body.root
    if after.op != "tuple" or not callable(start):
      return None
    source = body.instructions[after.operands[index]]
    same = source.op == "get-tuple-element" and _index(source) == index
    of = body.instructions[source.operands[0]] if same else None
    return start(index) if of and of.op == "parameter" else None

  return element


def _trips(program: Program, loop: Instruction, start: Value) -> int:
  """A loop's trip count: as the text has it, or found by following its counter."""
  if known := _TRIPS.search(loop.attributes):
    return int(known[1])
  condition = program.computations[loop.attribute("condition") or ""]
  body = program.computations[loop.attribute("body") or ""]
  kept = _kept(program, body, start)
  if callable(start) and callable(kept):
    for instruction in condition.instructions.values():
      if instruction.op == "get-tuple-element":
        index = _index(instruction)
        first, bound = start(index), _bound(program, condition, kept, index)
        step = _step(program, body, kept, index)
        if isinstance(first, int) and bound is not None and step is not None:
          return max(0, -(-(bound - first) // step))
  raise ValueError(f"a loop with no known trip count: {str(loop)[:200]}")


# Two values that tell an element of the carry from a constant.
_PROBES = (1_000_003, 2_000_003)


def _carry(kept: Values, index: int, value: int) -> Values:
  """The one parameter of a loop's body or condition, with a value for one element."""
  return _only(lambda i: value if i == index else kept(i))


def _step(program: Program, body: Computation, kept: Values, index: int) -> int | None:
  """The positive constant that a trip adds to an element of the carry, if it does."""
  found = set()
  for probe in _PROBES:
    after = _value(program, body, body.root.name, _carry(kept, index, probe))
    value = after(index) if callable(after) else None
    found.add(value - probe if isinstance(value, int) else None)
  step = found.pop()
  return step if not found and step is not None and step > 0 else None


def _bound(
  program: Program, condition: Computation, kept: Values, index: int
) -> int | None:
  """The constant that an element of the carry has to stay below, if there is one."""
  found = set()
  for probe in _PROBES:
    left, right = _compared(program, condition, _carry(kept, index, probe))
    found.add(right if left == probe and isinstance(right, int) else None)
  bound = found.pop()
  return None if found else bound


def _compared(
  program: Program, condition: Computation, parameters: Values
) -> tuple[Value, Value]:
  """The two sides of a condition "less than"; unknown where it is another one."""
  root, inside = condition.root, condition
  if root.op == "fusion":
    operands, outer = root.operands, parameters
    parameters = lambda i: _value(program, condition, operands[i], outer)
    inside = program.computations[program.called(root)[0]]
    root = inside.root
  if root.op != "compare" or root.attribute("direction") != "LT":
    return None, None
  left, right = (_value(program, inside, n, parameters) for n in root.operands)
  return left, right


def _value(
  program: Program, inside: Computation, name: str, parameters: Values
) -> Value:
  """The value of an instruction's result, as far as it is known.

  Args:
    parameters: number of a parameter of `inside` to its value.
  """
  instruction = inside.instructions[name]
  of = lambda i: _value(program, inside, instruction.operands[i], parameters)
  op = instruction.op
  if op == "constant":
    return int(instruction.literal) if _is_integer(instruction.literal) else None
  if op == "parameter":
    return parameters(int(instruction.literal))
  if op in _SAME or op == "copy-start":
    return of(0)
  if op == "tuple":
    return of
  if op == "get-tuple-element":
    value = of(0)
    return value(_index(instruction)) if callable(value) else None
  if op in ("add", "subtract"):
    a, b = of(0), of(1)
    if isinstance(a, int) and isinstance(b, int):
      return a + b if op == "add" else a - b
  if op == "fusion" and all(
    a.dtype == "s32" and not a.dims for a in instruction.arrays
  ):
    fused = program.computations[program.called(instruction)[0]]
    return _value(program, fused, fused.root.name, of)
  return None


def _index(instruction: Instruction) -> int:
  return int(instruction.attribute("index") or 0)


def _is_integer(literal: str) -> bool:
  return re.fullmatch(r"-?\d+", literal) is not None
