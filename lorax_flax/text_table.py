"""Text tables in aligned columns, for terminals and logs."""

from collections.abc import Iterable, Sequence
from typing import Any


def render(
  header: Sequence[Any],
  rows: Iterable[Sequence[Any]],
  *,
  align: str = "",
  title: str = "",
) -> str:
  """A table as text: lines without a newline at the end, two spaces between columns.

  Args:
    header: names of the columns.
    rows: cells of each line, as many as the header has; an empty row is a blank line.
    align: "l" or "r" for each column; those beyond its end are left-aligned.
    title: a line above the table; "" for none.
  """
  lines = [[str(cell) for cell in row] for row in (header, *rows)]
  full = [line for line in lines if line]
  widths = [max(map(len, column)) for column in zip(*full, strict=True)]
  sides = align.ljust(len(widths), "l")
  texts = [
    "  ".join(
      cell.rjust(width) if side == "r" else cell.ljust(width)
      for cell, width, side in zip(line, widths if line else (), sides, strict=False)
    ).rstrip()
    for line in lines
  ]
  return "\n".join([*([title] if title else []), *texts])
