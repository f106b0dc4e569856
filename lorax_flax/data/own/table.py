"""Rows of a user's file: JSON lines, CSV, TSV or Parquet.

Every format gives the same: rows of named values, each with its place in the file, so
that whatever is wrong later can be said of a line.
"""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.files import strict_json


class Row(NamedTuple):
  """A row of a table.

  Attributes:
    place: "line 3" of a text, the line on which the row starts, or "row 2", from 1.
    values: by column; a column that the row lacks is not in it.
  """

  place: str
  values: Mapping[str, Any]


class Bad(NamedTuple):
  """A row that can't be read, by its place, and why: "is not JSON: …"."""

  place: str
  why: str


@dataclass(frozen=True)
class Table:
  """The rows of one file.

  Attributes:
    file: that they were read from.
    columns: their names, in the file's order.
    rows: all of them, at least one.
    bad: those that were skipped, where that was asked for.
  """

  file: Path
  columns: tuple[str, ...]
  rows: Sequence[Row]
  bad: tuple[Bad, ...] = ()

  def __len__(self) -> int:
    return len(self.rows)


def read(file: Path, *, skip: bool = False) -> Table:
  """Reads a file, whose ending says the format.

  Args:
    skip: rows that are malformed are left out, and listed.

  Raises:
    LoraxError: no such file, an unknown ending, one without rows, a column that is
      there twice, or a row that is malformed; it names the line.
  """
  ending = file.suffix.lower()
  if ending not in FORMATS:
    raise LoraxError(f"{file}: {unknown('ending', ending, FORMATS)}")
  if not file.is_file():
    raise LoraxError(f"no file {file}")
  rows, bad = sorted_out(file, FORMATS[ending](file), skip)
  if not rows:
    raise LoraxError(f"{file} has no rows" + " that can be read" * bool(bad))
  names = dict.fromkeys(name for row in rows for name in row.values)
  return Table(file, tuple(names), rows, bad)


def sorted_out(
  file: Path, found: Iterable[Row | Bad], skip: bool
) -> tuple[list[Row], tuple[Bad, ...]]:
  """The rows, and the malformed ones: LoraxError for the first unless `skip`."""
  rows: list[Row] = []
  bad: list[Bad] = []
  for row in found:
    if isinstance(row, Row):
      rows.append(row)
    elif skip:
      bad.append(row)
    else:
      raise LoraxError(f"{file}: {row.place} {row.why}")
  return rows, tuple(bad)


def none_of_use(file: Path, bad: Sequence[Bad]) -> str:
  """The message about a file of which no row is left."""
  first = f"{bad[0].place}: {bad[0].why}" if bad else "it has none"
  return f"{file}: no row is of use: {first}"


def text(table: Table, row: Row, name: str) -> str:
  """The text of a row's column; LoraxError where it is none, or is blank."""
  value = row.values[name]
  if not isinstance(value, str) or not value.strip():
    what = "is empty" if isinstance(value, str) else f"is no text: {value!r:.80}"
    raise LoraxError(f"{table.file}: {row.place}: its {name} {what}")
  return value


def _json_lines(file: Path) -> Iterator[Row | Bad]:
  for number, line in strict_json.lines_or_errors(file):
    place = f"line {number}"
    if isinstance(line, ValueError):
      yield Bad(place, str(line))
    else:
      yield Row(place, line)


def _json(file: Path) -> Iterator[Row | Bad]:
  """A list of objects; a file of this ending that holds lines is read as these."""
  with file.open("rb") as stream:
    first = stream.read(64).decode("utf-8-sig", "replace").lstrip()[:1]
  if first != "[":
    yield from _json_lines(file)
    return
  listed = strict_json.read(file, most_bytes=os.stat(file).st_size)
  for number, value in enumerate(listed, 1):
    if isinstance(value, dict):
      yield Row(f"row {number}", value)
    else:
      yield Bad(f"row {number}", f"is no object: {value!r:.80}")


def _separated(delimiter: str) -> Callable[[Path], Iterator[Row | Bad]]:
  def read(file: Path) -> Iterator[Row | Bad]:
    text = io.StringIO(_text(file), newline="")
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    start = 1
    with _long_fields(), _malformed(file, lambda: start):
      header = next(lines, None)
      if header is None or not any(header):
        raise LoraxError(f"{file} is empty, or its first line is blank")
      names = _names(file, header)
      start = lines.line_num + 1
      for values in lines:
        if values:  # A blank line is no row.
          if len(values) == len(names):
            yield Row(f"line {start}", dict(zip(names, values, strict=True)))
          else:
            yield Bad(
              f"line {start}",
              f"has {len(values)} values, and there are {len(names)} columns: "
              f"{listing(names)}",
            )
        start = lines.line_num + 1

  return read


def _names(file: Path, header: Sequence[str]) -> list[str]:
  names = [name.strip() for name in header]
  for name in names:
    if names.count(name) > 1:
      raise LoraxError(f"{file}: the column {name!r} is there twice")
    if not name:
      raise LoraxError(f"{file}: column {names.index(name) + 1} has no name")
  return names


def _text(file: Path) -> str:
  raw = file.read_bytes()
  try:
    return raw.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = raw.count(b"\n", 0, error.start) + 1
    raise LoraxError(
      f"{file}: line {line} is not UTF-8 ({error.reason}); save the file as UTF-8"
    ) from error


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
  """Lets a value be longer than 128 Ki characters, as a document is."""
  before = csv.field_size_limit(2**31 - 1)
  try:
    yield
  finally:
    csv.field_size_limit(before)


@contextlib.contextmanager
def _malformed(file: Path, line: Callable[[], int]) -> Iterator[None]:
  try:
    yield
  except csv.Error as error:
    raise LoraxError(f"{file}: the row from line {line()} on: {error}") from error


def _parquet(file: Path) -> Iterator[Row]:
  import pyarrow
  import pyarrow.parquet

  try:
    table = pyarrow.parquet.read_table(file)
  except (pyarrow.ArrowException, OSError) as error:
    raise LoraxError(f"cannot read {file}: {error}") from error
  _names(file, table.column_names)
  for number, values in enumerate(table.to_pylist(), 1):
    present = {name: x for name, x in values.items() if x is not None}
    yield Row(f"row {number}", present)


FORMATS: dict[str, Callable[[Path], Iterator[Row | Bad]]] = {
  ".csv": _separated(","),
  ".json": _json,
  ".jsonl": _json_lines,
  ".ndjson": _json_lines,
  ".parquet": _parquet,
  ".tsv": _separated("\t"),
}
