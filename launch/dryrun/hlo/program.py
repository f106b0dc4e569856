"""Parser of HLO text: a program's computations, instructions and arrays."""

import functools
import math
import re
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
  r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\w+\[[^\]]*\]\S*) ([\w\-]+)\((.*)$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"[a-z]+(\d+)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_MEMORY = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations|called_computations)="
  r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclass(frozen=True)
class Array:
  """An array and its layout in memory.

  Attributes:
    dtype: XLA's name, "bf16".
    dims: logical sizes.
    layout: the text in braces after the sizes; "" where there is none.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: str = ""

  @property
  def size(self) -> float:
    """Bytes, without the padding of tiles."""
    return _bytes(self.dtype) * math.prod(self.dims)

  @property
  def padded(self) -> float:
    """Bytes, with the most minor dimensions rounded up to full tiles."""
    order, _, rest = self.layout.partition(":")
    tile = _TILE.match(rest)
    if not tile or not order:
      return self.size
    sizes = [self.dims[int(i)] for i in reversed(order.split(","))]
    for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")]), 1):
      if i <= len(sizes):
        sizes[-i] = -(-sizes[-i] // n) * n
    return _bytes(self.dtype) * math.prod(sizes)

  @property
  def in_hbm(self) -> bool:
    """True for the device's main memory, false for one of its caches."""
    space = _MEMORY.search(self.layout)
    return space is None or space[1] == "0"


@dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the program.
    op: the operation, "fusion".
    shape: text of the result's type.
    rest: text after the operation's opening parenthesis.
    root: true for the computation's result.
  """

  name: str
  op: str
  shape: str
  rest: str
  root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The result, or the leaves of a tuple."""
    return tuple(
      Array(dtype, tuple(map(int, filter(None, dims.split(",")))), layout)
      for dtype, dims, layout in _ARRAY.findall(self.shape)
    )

  @functools.cached_property
  def _closed(self) -> int:
    """Index in `rest` of the parenthesis that closes the operands."""
    depth = 1
    for at, char in enumerate(self.rest):
      depth += (char == "(") - (char == ")")
      if not depth:
        return at
    raise ValueError(f"an instruction without an end: {self}")

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of the instructions that are its operands."""
    return tuple(re.findall(r"%([\w.\-]+)", self.rest[: self._closed]))

  @property
  def literal(self) -> str:
    """Text between the parentheses: a parameter's number, a constant's value."""
    return self.rest[: self._closed]

  @functools.cached_property
  def attributes(self) -> str:
    """Text after the operands."""
    return self.rest[self._closed :]

  def attribute(self, name: str) -> str | None:
    """The value of an attribute that is a single word."""
    found = re.search(rf"\b{name}=%?([^\s,]+)", self.attributes)
    return found[1] if found else None

  def __str__(self) -> str:
    return f"%{self.name} = {self.shape} {self.op}({self.rest}"[:300]


@dataclass
class Computation:
  """Instructions by name, in the order of the text."""

  name: str
  instructions: dict[str, Instruction] = field(default_factory=dict)

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    found = (i for i in self.instructions.values() if i.op == "parameter")
    return {int(i.literal): i for i in found}


@dataclass
class Program:
  """Computations by name, and the name of the entry computation."""

  computations: dict[str, Computation]
  entry: str

  def called(self, instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction calls."""
    groups = [a or b for a, b in _CALLED.findall(instruction.attributes)]
    names = [name.strip().lstrip("%") for group in groups for name in group.split(",")]
    return [name for name in names if name in self.computations]


@functools.lru_cache(maxsize=2)
def parse(text: str) -> Program:
  """Parses `compiled.as_text()`.

  Raises:
    ValueError: the text holds no entry computation.
  """
  program = Program({}, "")
  current = None
  for line in text.splitlines():
    if opened := _COMPUTATION.match(line.strip()):
      current = Computation(opened[2])
      program.computations[opened[2]] = current
      program.entry = opened[2] if opened[1] else program.entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      root, name, shape, op, rest = found.groups()
      current.instructions[name] = Instruction(name, op, shape, rest, bool(root))
  if not program.entry:
    raise ValueError("this is not the text of a compiled program")
  return program


def _bytes(dtype: str) -> float:
  bits = _BITS.match(dtype)
  return int(bits[1]) / 8 if bits else 1  # pred
