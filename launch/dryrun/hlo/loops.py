"""How often each computation of a program runs."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch.dryrun.hlo.program import Computation, Instruction, Program

# Operations that run another computation as a part of the program, not inside of one
# instruction (a fusion's, a reduction's).
_CONTROL = frozenset({"while", "conditional", "call", "async-start"})
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = frozenset({"copy", "bitcast", "copy-done", "convert", "reshape"})


@dataclass(frozen=True)
class Runs:
  """Times that each computation runs.

  Attributes:
    all: of every computation.
    control: of the entry, loops and branches alone: what is scheduled as a step of its
      own, and not part of an instruction.
  """

  all: Counter[str]
  control: Counter[str]


# A known integer; a tuple, as a function of the place to a value; or unknown.
Value = int | Callable[[int], Any] | None


def count(program: Program) -> Runs:
  """Counts runs from the entry.

  Raises:
    ValueError: a loop whose number of trips the text does not give.
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
      start = _value(program, computation, instruction.operands[0], argument)
      trips = _trips(program, instruction, start)
      body = program.computations[instruction.attribute("body") or ""]
      kept = _kept(program, body, start)
      for other in called:
        visit(other, times * trips, kept, inner)

  visit(program.entry, 1, None, True)
  return runs


def _kept(program: Program, body: Computation, start: Value) -> Value:
  """The loop's carry, where it is the same in every run."""

  def element(place: int) -> Value:
    after = body.root
    if after.op != "tuple" or not callable(start):
      return None
    source = body.instructions[after.operands[place]]
    same = source.op == "get-tuple-element" and _index(source) == place
    of = body.instructions[source.operands[0]] if same else None
    return start(place) if of and of.op == "parameter" else None

  return element


def _trips(program: Program, loop: Instruction, start: Value) -> int:
  """From the text where it says so, else by following the place that is counted up."""
  if known := _TRIPS.search(loop.attributes):
    return int(known[1])
  condition = program.computations[loop.attribute("condition") or ""]
  body = program.computations[loop.attribute("body") or ""]
  kept = _kept(program, body, start)
  if callable(start) and callable(kept):
    for instruction in condition.instructions.values():
      if instruction.op == "get-tuple-element":
        place = _index(instruction)
        first, bound = start(place), _bound(program, condition, kept, place)
        step = _step(program, body, kept, place)
        if isinstance(first, int) and bound is not None and step is not None:
          return max(0, -(-(bound - first) // step))
  raise ValueError(f"a loop with no known trip count: {str(loop)[:200]}")


# Two values that tell a place of the carry from a constant.
_PROBES = (1_000_003, 2_000_003)


def _with(kept: Callable[[int], Value], place: int, value: int) -> Value:
  return lambda i: value if i == place else kept(i)


def _step(program: Program, body: Computation, kept, place: int) -> int | None:
  """What a run adds to a place of the carry."""
  found = set()
  for probe in _PROBES:
    after = _value(program, body, body.root.name, _with(kept, place, probe))
    value = after(place) if callable(after) else None
    found.add(value - probe if isinstance(value, int) else None)
  step = found.pop()
  return step if not found and step is not None and step > 0 else None


def _bound(program: Program, condition: Computation, kept, place: int) -> int | None:
  """What a place of the carry has to stay below."""
  found = set()
  for probe in _PROBES:
    left, right = _compared(program, condition, _with(kept, place, probe))
    found.add(right if left == probe and isinstance(right, int) else None)
  bound = found.pop()
  return None if found else bound


def _compared(
  program: Program, condition: Computation, argument: Value
) -> tuple[Value, Value]:
  """The two sides of a condition "less than"; unknown where it is another one."""
  root, inside = condition.root, condition
  of = lambda name: _value(program, condition, name, argument)
  if root.op == "fusion":
    inside = program.computations[program.called(root)[0]]
    given = [of(name) for name in root.operands]
    root = inside.root
    by_name = {inside.parameters[i].name: v for i, v in enumerate(given)}
    of = lambda name: (
      by_name[name] if name in by_name else _value(program, inside, name, None)
    )
  if root.op != "compare" or root.attribute("direction") != "LT":
    return None, None
  return of(root.operands[0]), of(root.operands[1])


def _value(program: Program, inside: Computation, name: str, argument: Value) -> Value:
  """What an instruction's result is known to be.

  Args:
    argument: of the computation's first parameter.
  """
  instruction = inside.instructions[name]
  of = lambda i: _value(program, inside, instruction.operands[i], argument)
  op = instruction.op
  if op == "constant":
    return int(instruction.literal) if _is_integer(instruction.literal) else None
  if op == "parameter":
    return argument if instruction.literal == "0" else None
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
    return None
  if op == "fusion":
    return _of_fusion(program, inside, instruction, argument)
  return None


def _of_fusion(program, inside, fusion: Instruction, argument: Value) -> Value:
  """A fusion's result, where it only adds integers."""
  if not fusion.arrays or any(a.dims or a.dtype != "s32" for a in fusion.arrays):
    return None
  fused = program.computations[program.called(fusion)[0]]

  def value(name: str) -> Value:
    instruction = fused.instructions[name]
    if instruction.op == "parameter":
      operand = fusion.operands[int(instruction.literal)]
      return _value(program, inside, operand, argument)
    if instruction.op == "constant":
      return _value(program, fused, name, None)
    if instruction.op in _SAME:
      return value(instruction.operands[0])
    if instruction.op in ("add", "subtract"):
      a, b = map(value, instruction.operands)
      if isinstance(a, int) and isinstance(b, int):
        return a + b if instruction.op == "add" else a - b
    return None

  return value(fused.root.name)


def _index(instruction: Instruction) -> int:
  return int(instruction.attribute("index") or 0)


def _is_integer(literal: str) -> bool:
  return re.fullmatch(r"-?\d+", literal) is not None
