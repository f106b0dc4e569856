"""An interpreter for pickles of plain data: few instructions, and few known names.

Python's own unpickler imports and calls what a file names, and can be made to allocate
any amount of memory; nothing here does either.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from lorax_flax.errors import LoraxError

_MOST_INT_BYTES = 16


def run(
  program: bytes, names: Mapping[str, Any], persistent: Callable[[Any], Any]
) -> Any:
  """The value of a pickle: dicts, lists, tuples, texts, numbers and `names`' values.

  Args:
    program: protocols 2 to 5.
    names: "module.name" to its value; those that are callable may be called. Dicts have
      str keys only; attributes that are set on one are dropped.
    persistent: persistent id to its value.

  Raises:
    LoraxError: another name, another instruction, or a damaged program.
  """
  machine = _Machine(program, names, persistent)
  try:
    return machine.run()
  except LoraxError:
    raise
  except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
    raise LoraxError(f"its pickle is damaged at byte {machine.at}") from error


class _Machine:
  """A stack, a memo, and the position in the program."""

  def __init__(self, program, names, persistent):
    self.program, self.names, self.persistent = program, names, persistent
    self.at = 0
    self.stack: list[Any] = []
    self.below: list[list[Any]] = []  # the stacks under each mark
    self.memo: dict[int, Any] = {}

  def run(self) -> Any:
    while True:
      code = self.take(1)
      if code == b".":
        return self.stack.pop()
      if code not in _INSTRUCTIONS:
        raise LoraxError(
          f"its pickle has the instruction {code!r} at byte {self.at - 1}, which state"
          " dicts do not need; it is refused, and nothing of it was run"
        )
      _INSTRUCTIONS[code](self)

  def take(self, count: int) -> bytes:
    piece = self.program[self.at : self.at + count]
    if len(piece) < count:
      raise ValueError("the program ends early")
    self.at += count
    return piece

  def number(self, form: str) -> int:
    return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

  def line(self) -> str:
    end = self.program.index(b"\n", self.at)
    return self.take(end + 1 - self.at)[:-1].decode()

  def to_mark(self) -> list[Any]:
    """Pops all above the last mark, and the mark."""
    items, self.stack = self.stack, self.below.pop()
    return items

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def text(self, form: str) -> None:
    self.push(self.take(self.number(form)).decode("utf-8", "surrogatepass"))

  def long(self) -> None:
    size = self.number("B")
    if size > _MOST_INT_BYTES:
      raise ValueError("a number of many digits")
    self.push(int.from_bytes(self.take(size), "little", signed=True))

  def mark(self) -> None:
    self.below.append(self.stack)
    self.stack = []

  def tuple_of(self, count: int) -> None:
    if len(self.stack) < count:
      raise IndexError("too few for a tuple")
    items = tuple(self.stack[-count:])
    self.stack[-count:] = [items]

  def mention(self, module: Any, name: Any) -> None:
    full = f"{module}.{name}"
    if full not in self.names:
      raise LoraxError(
        f"it names {full[:100]!r}, which is no part of a state dict; it is refused,"
        " and nothing of it was run"
      )
    self.push(self.names[full])

  def mention_stacked(self) -> None:
    name, module = self.stack.pop(), self.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
      raise TypeError("a name that is no text")
    self.mention(module, name)

  def call(self) -> None:
    args, function = self.stack.pop(), self.stack.pop()
    # Only `names` holds callables, so that nothing else can be called.
    if not callable(function) or not isinstance(args, tuple):
      raise TypeError("a call of an unknown function")
    self.push(function(*args))

  def build(self) -> None:
    """Drops attributes of a dict ("_metadata" of a module's state)."""
    self.stack.pop()
    if not isinstance(self.stack[-1], dict):
      raise TypeError("attributes of a value that is not a dict")

  def put_items(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
      raise TypeError("items of a value that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not isinstance(key, str):
        raise LoraxError(f"a dict in it has a key of type {type(key).__name__}")
      if key in target:
        raise LoraxError(f"a dict in it has the key {key!r} twice")
      target[key] = value

  def append(self, items: list[Any]) -> None:
    target = self.stack[-1]
    if not isinstance(target, list):
      raise TypeError("items of a value that is not a list")
    target.extend(items)

  def remember(self, key: int) -> None:
    self.memo[key] = self.stack[-1]

  def pop_two(self) -> list[Any]:
    value, key = self.stack.pop(), self.stack.pop()
    return [key, value]


_INSTRUCTIONS: Mapping[bytes, Callable[[_Machine], Any]] = {
  b"\x80": lambda m: m.take(1),  # PROTO
  b"\x95": lambda m: m.take(8),  # FRAME
  b"(": _Machine.mark,
  b")": lambda m: m.push(()),
  b"t": lambda m: m.push(tuple(m.to_mark())),
  b"\x85": lambda m: m.tuple_of(1),
  b"\x86": lambda m: m.tuple_of(2),
  b"\x87": lambda m: m.tuple_of(3),
  b"]": lambda m: m.push([]),
  b"}": lambda m: m.push({}),
  b"N": lambda m: m.push(None),
  b"\x88": lambda m: m.push(True),
  b"\x89": lambda m: m.push(False),
  b"J": lambda m: m.push(m.number("i")),
  b"K": lambda m: m.push(m.number("B")),
  b"M": lambda m: m.push(m.number("H")),
  b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
  b"\x8a": _Machine.long,
  b"X": lambda m: m.text("I"),
  b"\x8c": lambda m: m.text("B"),
  b"q": lambda m: m.remember(m.number("B")),
  b"r": lambda m: m.remember(m.number("I")),
  b"\x94": lambda m: m.remember(len(m.memo)),
  b"h": lambda m: m.push(m.memo[m.number("B")]),
  b"j": lambda m: m.push(m.memo[m.number("I")]),
  b"c": lambda m: m.mention(m.line(), m.line()),
  b"\x93": _Machine.mention_stacked,
  b"R": _Machine.call,
  b"b": _Machine.build,
  b"Q": lambda m: m.push(m.persistent(m.stack.pop())),
  b"s": lambda m: m.put_items(m.pop_two()),
  b"u": lambda m: m.put_items(m.to_mark()),
  b"a": lambda m: m.append([m.stack.pop()]),
  b"e": lambda m: m.append(m.to_mark()),
}
