"""Lines that show what was found in a user's files."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorax_flax.data.own.forms import FORMS
from lorax_flax.data.own.labels import NUMBER, SEVERAL, Labels
from lorax_flax.data.own.splits import TRAIN
from lorax_flax.data.own.table import Bad, Table
from lorax_flax.errors import listing

_MOST_CLASSES = 30  # that are shown
_REASONS = 5  # for which rows are skipped, that are shown


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


def of_skipped(files: Iterable[tuple[Path, Sequence[Bad]]]) -> list[str]:
  """The reasons of a file's most rows with the place of the first, and the other rows.

  Args:
    files: each with its rows that are skipped.
  """
  return [line for file, skipped in files for line in _of_skipped(file, skipped)]


def _of_skipped(file: Path, skipped: Sequence[Bad]) -> list[str]:
  first = {bad.why: bad.place for bad in reversed(skipped)}
  reasons = Counter(bad.why for bad in skipped).most_common()
  lines = [
    f"{file}: {number:,} rows are skipped: {why} (the first: {first[why]})"
    for why, number in reasons[:_REASONS]
  ]
  rest = sum(number for _, number in reasons[_REASONS:])
  return [*lines, f"{file}: {rest:,} more rows are skipped"] if rest else lines


def of_lengths(
  lengths_N: np.ndarray,
  max_length: int,
  what: str = "row",
  setting: str = "data.max_length",
) -> str:
  """The lengths of rows in tokens, and what is cut.

  Args:
    lengths_N: before anything is cut.
    max_length: of the settings.
    what: has these tokens: a row, or one text of it.
    setting: name of max_length.
  """
  over_N = lengths_N[lengths_N > max_length]
  cut = f"none is longer than {setting} = {max_length}"
  if len(over_N):
    cut = (
      f"{len(over_N):,} of {len(lengths_N):,} {what}s are cut to {setting} = "
      f"{max_length}; {int((over_N - max_length).sum()):,} of "
      f"{int(lengths_N.sum()):,} tokens are left out"
    )
  median, longest = np.median(lengths_N), lengths_N.max()
  return (
    f"tokens of a {what}: {median:g} in the median, {longest:,} in the longest; {cut}"
  )


def of_labels(labels: Labels) -> list[str]:
  """The classes with their number of rows by split, or the range of numbers."""
  if labels.kind == NUMBER:
    values = labels.values[TRAIN]
    return [
      f"labels: numbers from {values.min():g} to {values.max():g}, mean "
      f"{values.mean():g}, std {values.std():g} in {TRAIN}"
    ]
  several = ", of which a row may have several" if labels.kind == SEVERAL else ""
  counts = {split: labels.counts(split) for split in labels.values}
  names = sorted(labels.names, key=lambda name: -counts[TRAIN][name])[:_MOST_CLASSES]
  more = len(labels.names) - len(names)
  return [
    f"labels: {len(labels.names)} classes{several}",
    *(
      f"  {name}: {', '.join(f'{n[name]:,} in {split}' for split, n in counts.items())}"
      for name in names
    ),
    *([f"  … {more} smaller ones"] if more else ()),
  ]
