"""Matmul FLOPs of a compiled program."""

import math
import re
from collections import Counter

from launch.dryrun import kernels
from launch.dryrun.hlo import loops, program
from launch.dryrun.hlo.program import Computation, Instruction

# Custom calls that multiply matrices, whose sizes their text does not give.
_OPAQUE = re.compile(r'custom_call_target="([^"]*(?:matmul|gemm|conv|dot)[^"]*)"', re.I)


def matmul_flops(text: str) -> int:
  """Counts 2 × the multiplications of every dot and convolution, loops multiplied out.

  Args:
    text: the program, `compiled.as_text()`.

  Raises:
    ValueError: a loop with no known trip count, or a product hidden in a custom call.
  """
  found = program.parse(text)
  runs = loops.count(found).all
  return sum(
    times * flops(instruction, found.computations[name])
    for name, times in runs.items()
    for instruction in found.computations[name].instructions.values()
  )


def kernel_runs(text: str) -> Counter[str]:
  """Number of runs of each of `kernels.ATTENTION` that the program has."""
  found = program.parse(text)
  runs: Counter[str] = Counter()
  for name, times in loops.count(found).all.items():
    for instruction in found.computations[name].instructions.values():
      is_call = instruction.op == "custom-call"
      if is_call and (start := kernels.known(instruction.name, kernels.ATTENTION)):
        runs[start] += times
  return runs


def flops(instruction: Instruction, inside: Computation) -> int:
  """FLOPs of one run of one instruction; 0 unless it multiplies matrices."""
  if instruction.op == "dot":
    return _dot(instruction, inside)
  if instruction.op == "convolution":
    return _convolution(instruction, inside)
  if instruction.op == "custom-call":
    if known := kernels.products(instruction.name):
      return known.executed * known.flops(_floats(instruction, inside))
    rows = kernels.ragged_rows(instruction.attributes)
    if rows is not None and "tpu_custom_call" in instruction.attributes:
      left, result = _floats(instruction, inside)[0], instruction.arrays[0].dims
      # A product NxO, or ExIxO, its gradient by the matrices.
      inputs = left[1] if len(result) == 2 else result[1]
      return 2 * rows * inputs * result[-1]
    opaque = _OPAQUE.search(instruction.attributes)
    if opaque:
      raise ValueError(f"a product in the custom call {opaque[1]!r} cannot be counted")
  return 0


def _floats(instruction: Instruction, inside: Computation) -> list[tuple[int, ...]]:
  """Shapes of the floating-point operands."""
  arrays = (inside.instructions[name].arrays[0] for name in instruction.operands)
  return [x.dims for x in arrays if x.dtype.startswith(("bf", "f"))]


def _dims(inside: Computation, name: str) -> tuple[int, ...]:
  return inside.instructions[name].arrays[0].dims


def _dot(instruction: Instruction, inside: Computation) -> int:
  left = _dims(inside, instruction.operands[0])
  numbers = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
  contracted = [left[int(i)] for i in numbers[1].split(",") if i] if numbers else []
  return 2 * math.prod(instruction.arrays[0].dims) * math.prod(contracted)


def _convolution(instruction: Instruction, inside: Computation) -> int:
  """FLOPs of a convolution; a TPU's compiler writes every dot as one.

  Batch axes become dilated windows. A window's positions outside of the input, or in
  the holes of a dilated input, cost nothing.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  if labels is None:
    raise ValueError(f"a convolution without labels: {instruction}")
  left, kernel = (_dims(inside, name) for name in instruction.operands[:2])
  out = instruction.arrays[0].dims
  positions = 1
  for axis in filter(str.isdigit, labels[1]):
    positions *= _overlaps(
      left[labels[1].index(axis)],
      kernel[labels[2].index(axis)],
      out[labels[3].index(axis)],
      _window(instruction, int(axis)),
    )
  rows = out[labels[3].index("b")] * out[labels[3].index("f")]
  groups = int(instruction.attribute("batch_group_count") or 1)
  return 2 * rows * kernel[labels[2].index("i")] * positions // groups


def _window(instruction: Instruction, axis: int) -> tuple[int, int, int, int]:
  """Stride, low padding, and dilation of the input and of the kernel, of one axis."""
  found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  fields = dict(f.split("=") for f in found[1].split()) if found else {}

  def of(name: str, default: str) -> str:
    return fields[name].split("x")[axis] if name in fields else default

  low = int(of("pad", "0_0").split("_")[0])
  return (
    int(of("stride", "1")),
    low,
    int(of("lhs_dilate", "1")),
    int(of("rhs_dilate", "1")),
  )


def _overlaps(
  size: int, width: int, out: int, window: tuple[int, int, int, int]
) -> int:
  """Number of (result, kernel) positions of one axis that read an input element."""
  stride, low, holes, spread = window
  last = (size - 1) * holes
  if width == 1 and not low and holes == 1:
    return sum(o * stride <= last for o in range(out))
  return sum(
    0 <= at <= last and at % holes == 0
    for o in range(out)
    for at in (o * stride + k * spread - low for k in range(width))
  )
