"""Lines that show what was found in a user's files."""

from collections.abc import Mapping

import numpy as np

from lorax_flax.data.own.forms import FORMS
from lorax_flax.data.own.table import Table
from lorax_flax.errors import listing


def of_files(
  tables: Mapping[str, Table], form: str, columns: Mapping[str, str]
) -> list[str]:
  """The form, the columns that are read and those that are not, and rows by split.

  Args:
    tables: by split, as `splits.read_splits` gives them.
    form: a key of `FORMS`.
    columns: as of `forms.find`.
  """
  files = dict.fromkeys(str(table.file) for table in tables.values())
  present = dict.fromkeys(name for table in tables.values() for name in table.columns)
  own = {columns.get(name, name): name for name in FORMS[form].columns}
  read = [
    name if own[name] == name else f"{name} as {own[name]}"
    for name in present
    if name in own
  ]
  left = [name for name in present if name not in own]
  return [
    f"{' and '.join(files)}: {FORMS[form].title}, of the columns {', '.join(read)}; "
    f"not read: {listing(left) if left else 'none'}",
    "rows: " + ", ".join(f"{len(t):,} in {name}" for name, t in tables.items()),
  ]


def of_lengths(lengths_N: np.ndarray, max_length: int) -> str:
  """The lengths of rows in tokens, and what is cut.

  Args:
    lengths_N: before anything is cut.
    max_length: of the settings.
  """
  over_N = lengths_N[lengths_N > max_length]
  cut = f"none is longer than data.max_length = {max_length}"
  if len(over_N):
    cut = (
      f"{len(over_N):,} of {len(lengths_N):,} rows are cut to data.max_length = "
      f"{max_length}; {int((over_N - max_length).sum()):,} of "
      f"{int(lengths_N.sum()):,} tokens are left out"
    )
  return (
    f"tokens of a row: {np.median(lengths_N):g} in the median, {lengths_N.max():,} in "
    f"the longest; {cut}"
  )
