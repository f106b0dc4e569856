"""Strict JSON: bounded size, no duplicate names, and finite numbers only."""

import codecs
import collections
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lorax_flax.errors import LoraxError
from lorax_flax.files import streams

_MOST_BYTES = 32 << 20  # a header of 200,000 tensors, read in half a second


def parse(text: str | bytes) -> Any:
  """The value of a JSON text.

  Python's own parser accepts NaN, and keeps the last of two values of one name: two
  parsers could see different content.

  Raises:
    ValueError: not JSON in UTF-8, a duplicate name in an object, a number that is not
      finite, or too deep a nesting.
  """
  if isinstance(text, bytes):
    text = text.decode("utf-8")
  try:
    return json.loads(
      text,
      object_pairs_hook=_object,
      parse_constant=_refuse_constant,
      parse_float=_finite,
    )
  except RecursionError as error:
    raise ValueError("too many brackets in one another") from error


def dump(value: Any, *, indent: int | None = None) -> str:
  """The JSON text of a value; null takes the place of a number that is not finite."""
  return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=False)


def _with_nulls(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {name: _with_nulls(each) for name, each in value.items()}
  if isinstance(value, list | tuple):
    return [_with_nulls(each) for each in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read(file: Path, *, most_bytes: int = _MOST_BYTES) -> Any:
  """The value of a JSON file.

  Raises:
    LoraxError: no such file, one larger than `most_bytes`, or an error of `parse`.
  """
  try:
    with file.open("rb") as stream:
      # Bounded by the file's size, since `read` allocates its argument.
      text = stream.read(min(os.fstat(stream.fileno()).st_size, most_bytes) + 1)
    if len(text) > most_bytes:
      raise ValueError(f"it is larger than {most_bytes:,} bytes")
    return parse(text.removeprefix(codecs.BOM_UTF8))
  except (OSError, ValueError) as error:
    raise LoraxError(f"cannot read {file}: {error}") from error


def read_object(file: Path, *, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
  """`read` of a file that holds an object."""
  value = read(file, most_bytes=most_bytes)
  if not isinstance(value, dict):
    raise LoraxError(f"{file} holds no JSON object, but {value!r:.80}")
  return value


def lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """The line numbers, from 1, and objects of JSON lines: of a file, a pipe, or "-".

  A byte order mark and blank lines at the end, as editors and spreadsheets write them,
  are passed over.

  Raises:
    LoraxError: what `lines_or_errors` raises, or a line that is not a JSON object; it
      names the line.
  """
  for number, line in lines_or_errors(file):
    if isinstance(line, ValueError):
      raise LoraxError(f"{file}: line {number} {line}") from line
    yield number, line


def lines_or_errors(file: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
  """`lines`, with an error in the place of a line that is no JSON object.

  Raises:
    LoraxError: no such file, an empty one, or a blank line before others.
  """
  source = streams.opened(file, "rb")
  if source is None and not file.is_file():
    raise LoraxError(f"no file {file}")
  number = last = 0
  with source or file.open("rb") as stream:
    for number, raw in enumerate(stream, 1):
      text = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
      if not text.strip():
        continue
      if number > last + 1:
        raise LoraxError(f"{file}: line {last + 1} is blank")
      last = number
      line: dict[str, Any] | ValueError
      try:
        line = _line(text)
      except ValueError as error:
        line = error
      yield number, line
  if not last:
    raise LoraxError(f"{file} is empty" + " but for blank lines" * (number > 0))


def _line(text: bytes) -> dict[str, Any]:
  try:
    line = parse(text)
  except ValueError as error:
    raise ValueError(f"is not JSON: {error}") from error
  if not isinstance(line, dict):
    raise ValueError(f"is no object: {line!r:.80}")
  return line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    twice = counts.most_common(1)[0][0]
    raise ValueError(f"{twice!r} is there twice in one object")
  return found


def _refuse_constant(name: str) -> NoReturn:
  raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
  value = float(digits)
  if not math.isfinite(value):
    raise ValueError(f"{digits} is larger than any number here")
  return value
