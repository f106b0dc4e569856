"""Bytes that a compiled program moves between a device and its main memory."""

from launch.hlo import loops, program
from launch.hlo.program import Computation, Instruction, Program

# What moves nothing: it names memory, or its two ends are counted elsewhere.
_STILL = frozenset(
  {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while"),
    *("conditional", "call", "after-all", "partition-id", "replica-id", "iota"),
    *("copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done"),
    *("async-start", "async-update", "async-done", "opt-barrier", "domain"),
    *("add-dependency", "send-done", "recv-done"),
  }
)
_READS_A_PART = frozenset({"dynamic-slice", "slice", "gather"})
_SAME = frozenset({"bitcast", "reshape", "transpose", "copy"})


def hbm_bytes(text: str) -> float:
  """Bytes read from and written to main memory, loops multiplied out.

  Each instruction reads its operands and writes its results once; what lies in a cache
  (a memory space other than 0) moves nothing. A fusion that takes a slice of an operand
  reads that slice, and one that updates a part of an array writes that part.

  Args:
    text: of `compiled.as_text()`.

  Raises:
    ValueError: a loop with no known trip count.
  """
  parsed = program.parse(text)
  total = 0.0
  for name, times in loops.count(parsed).control.items():
    computation = parsed.computations[name]
    total += times * sum(
      _moved(parsed, computation, i) for i in computation.instructions.values()
    )
  return total


def _moved(parsed: Program, inside: Computation, instruction: Instruction) -> float:
  if instruction.op in _STILL:
    return 0.0
  if instruction.op == "custom-call" and not instruction.operands:
    return 0.0  # Room, with nothing in it yet.
  if instruction.op == "fusion":
    fused = parsed.computations[parsed.called(instruction)[0]]
    return _of_fusion(fused)
  if instruction.op == "dynamic-update-slice":
    update = _array_bytes(inside.instructions[instruction.operands[1]])
    return 2 * update if _hbm(instruction) else update
  if instruction.op in _READS_A_PART:
    source = inside.instructions[instruction.operands[0]]
    part = sum(a.padded for a in instruction.arrays)
    return part * _hbm(source) + _array_bytes(instruction)
  if instruction.op == "copy-start":
    # To a cache or from one: (to, from, flag).
    return sum(a.padded for a in instruction.arrays[:2] if a.in_hbm)
  reads = sum(_array_bytes(inside.instructions[name]) for name in instruction.operands)
  if instruction.op.endswith("-start"):
    arrays = [a for a in instruction.arrays if a.dtype != "u32"]
    return reads + sum(a.padded for a in arrays[len(arrays) // 2 :] if a.in_hbm)
  return reads + _array_bytes(instruction)


def _hbm(instruction: Instruction) -> bool:
  return any(a.in_hbm for a in instruction.arrays)


def _array_bytes(instruction: Instruction) -> float:
  return sum(a.padded for a in instruction.arrays if a.in_hbm)


def _of_fusion(fused: Computation) -> float:
  users: dict[str, list[Instruction]] = {}
  for instruction in fused.instructions.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  reads = sum(
    _read(fused, users, parameter)
    for parameter in fused.parameters.values()
    if _hbm(parameter)
  )
  results = [fused.root]
  if fused.root.op == "tuple":
    results = [fused.instructions[name] for name in fused.root.operands]
  return reads + sum(_written(fused, result) for result in results)


def _read(fused: Computation, users, parameter: Instruction) -> float:
  """Bytes of a parameter that its users read."""
  whole = sum(a.padded for a in parameter.arrays)
  total, names = 0.0, [parameter.name]
  while names:
    name = names.pop()
    for user in users.get(name, ()):
      if user.op in _SAME or user.op == "tuple":
        if user.op in _SAME:
          names.append(user.name)
        continue
      if user.op in _READS_A_PART and user.operands[0] == name:
        total += sum(a.padded for a in user.arrays)
      elif user.op == "dynamic-update-slice" and user.operands[0] == name:
        continue  # In place.
      else:
        return whole
  return min(whole, total)


def _written(fused: Computation, result: Instruction) -> float:
  """Bytes of a result that are new."""
  if not _hbm(result):
    return 0.0
  source = result
  while source.op in _SAME:
    source = fused.instructions[source.operands[0]]
  if source.op == "parameter":
    return 0.0
  if source.op == "dynamic-update-slice":
    update = fused.instructions[source.operands[1]]
    return sum(a.padded for a in update.arrays)
  return sum(a.padded for a in result.arrays)
