"""Bytes that a compiled program moves between a device and its main memory."""

from launch.dryrun import kernels
from launch.dryrun.hlo import loops, program
from launch.dryrun.hlo.program import Computation, Instruction, Program

# Operations that move nothing: they name memory, or are counted elsewhere.
_FREE = frozenset(
  {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while"),
    *("conditional", "call", "after-all", "partition-id", "replica-id", "iota"),
    *("copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done"),
    *("async-start", "async-update", "async-done", "opt-barrier", "domain"),
    *("add-dependency", "send-done", "recv-done"),
  }
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_SAME = frozenset({"bitcast", "reshape", "transpose", "copy"})


def hbm_bytes(text: str) -> float:
  """Counts the bytes read from and written to main memory, loops multiplied out.

  Each instruction reads its operands and writes its results once; arrays in a cache (a
  memory space other than 0) cost nothing. A fusion that slices an operand reads the
  slice, and one that updates a slice of an array writes the slice. A ragged product
  moves the rows that it is expected to compute.

  Args:
    text: the program, `compiled.as_text()`.

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


def _of_rows(rows: int, inside: Computation, instruction: Instruction) -> float:
  """Bytes of a kernel that takes `rows` of the first floating-point operand's rows."""
  operands = [inside.instructions[name] for name in instruction.operands]
  arrays = [a for x in (*operands, instruction) for a in x.arrays]
  given = next(a.dims[0] for a in arrays if a.dtype.startswith(("bf", "f")))
  share = min(1.0, rows / given)
  moved = ((a, share if a.dims[:1] == (given,) else 1.0) for a in arrays)
  return sum(a.padded * part for a, part in moved if a.in_hbm)


def _moved(parsed: Program, inside: Computation, instruction: Instruction) -> float:
  if instruction.op in _FREE:
    return 0.0
  if instruction.op == "custom-call" and not instruction.operands:
    return 0.0  # An allocation, still empty.
  if instruction.op == "fusion":
    fused = parsed.computations[parsed.called(instruction)[0]]
    return _of_fusion(parsed, fused)
  if instruction.op == "dynamic-update-slice":
    update = _array_bytes(inside.instructions[instruction.operands[1]])
    return 2 * update if _hbm(instruction) else update
  if instruction.op in _SLICES:
    source = inside.instructions[instruction.operands[0]]
    part = _padded(instruction)
    return part * _hbm(source) + _array_bytes(instruction)
  if instruction.op == "copy-start":
    # To a cache or from one: (to, from, flag).
    return sum(a.padded for a in instruction.arrays[:2] if a.in_hbm)
  if instruction.op == "custom-call":
    rows = kernels.ragged_rows(instruction.attributes)
    if rows is not None:
      return _of_rows(rows, inside, instruction)
  reads = sum(_array_bytes(inside.instructions[name]) for name in instruction.operands)
  if instruction.op.endswith("-start"):
    arrays = [a for a in instruction.arrays if a.dtype != "u32"]
    return reads + sum(a.padded for a in arrays[len(arrays) // 2 :] if a.in_hbm)
  return reads + _array_bytes(instruction)


def _hbm(instruction: Instruction) -> bool:
  return any(a.in_hbm for a in instruction.arrays)


def _array_bytes(instruction: Instruction) -> float:
  return sum(a.padded for a in instruction.arrays if a.in_hbm)


def _of_fusion(parsed: Program, fused: Computation) -> float:
  reads = sum(
    _read(parsed, fused, parameter.name)
    for parameter in fused.parameters.values()
    if _hbm(parameter)
  )
  results = [fused.root]
  if fused.root.op == "tuple":
    results = [fused.instructions[name] for name in fused.root.operands]
  return reads + sum(_written(fused, result) for result in results)


def _read(parsed: Program, fused: Computation, name: str) -> float:
  """Bytes of an instruction's result that its users read."""
  full = _padded(fused.instructions[name])
  if fused.instructions[name].root:
    return full
  total = 0.0
  for user in fused.instructions.values():
    for place, operand in enumerate(user.operands):
      if operand != name or user.op == "tuple":
        continue
      if user.op in _SAME:
        total += _read(parsed, fused, user.name)
      elif user.op in _SLICES and place == 0:
        total += _padded(user)
      elif user.op == "fusion":
        inner = parsed.computations[parsed.called(user)[0]]
        total += _read(parsed, inner, inner.parameters[place].name)
      elif user.op != "dynamic-update-slice" or place:  # It updates in place.
        total += full
  return min(full, total)


def _padded(instruction: Instruction) -> float:
  return sum(a.padded for a in instruction.arrays)


def _written(fused: Computation, result: Instruction) -> float:
  """Bytes of a result that are written."""
  if not _hbm(result):
    return 0.0
  source = result
  while source.op in _SAME:
    source = fused.instructions[source.operands[0]]
  if source.op == "parameter":
    return 0.0
  if source.op == "dynamic-update-slice":
    update = fused.instructions[source.operands[1]]
    return _padded(update)
  return _padded(result)
