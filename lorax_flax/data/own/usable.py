"""The rows of a user's tables that a task can use."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from lorax_flax.data.own import forms
from lorax_flax.data.own.settings import OwnSettings
from lorax_flax.data.own.table import Bad, Row, Table, none_of_use
from lorax_flax.errors import LoraxError


def usable(
  tables: Mapping[str, Table],
  settings: OwnSettings,
  form: str,
  check: Callable[[Table, Row], object],
) -> Mapping[str, Table]:
  """The tables with a form's columns; what can't be used is an error, or skipped.

  Args:
    tables: by split, as `splits.read_splits` gives them.
    form: a key of `forms.FORMS`.
    check: raises LoraxError for a row that is of no use, with the row's place. Where
      rows are skipped those that it refuses are among the bad ones; otherwise it is not
      called.

  Raises:
    LoraxError: as of `forms.find`; no row of a table is left.
  """
  skip = settings.skips
  _, chosen = forms.find(tables, settings.columns, (form,), skip=skip)
  if not skip:
    return chosen
  return {split: _checked(table, check) for split, table in chosen.items()}


def _checked(table: Table, check: Callable[[Table, Row], object]) -> Table:
  rows, bad = [], list(table.bad)
  for row in table.rows:
    try:
      check(table, row)
    except LoraxError as error:
      why = str(error).removeprefix(f"{table.file}: {row.place}").lstrip(": ")
      bad.append(Bad(row.place, why))
    else:
      rows.append(row)
  if not rows:
    raise LoraxError(none_of_use(table.file, bad))
  return replace(table, rows=rows, bad=tuple(bad))
