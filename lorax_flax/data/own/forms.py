"""The form of a user's rows, found by the names of their columns."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorax_flax.data.own.table import Bad, Row, Table
from lorax_flax.errors import LoraxError, listing, nearest, unknown


@dataclass(frozen=True)
class Form:
  """Content of a row.

  Attributes:
    title: for a person.
    needs: columns that make the form.
    may: further columns that it reads.
  """

  title: str
  needs: tuple[str, ...]
  may: tuple[str, ...] = ()

  @property
  def columns(self) -> tuple[str, ...]:
    return (*self.needs, *self.may)


# The first whose columns are there is the form: a prompt beside a label is no class.
FORMS: dict[str, Form] = {
  "chat": Form("chats", ("messages",), ("tools", "documents", "chat_template_kwargs")),
  "completion": Form("prompts and their completions", ("prompt", "completion")),
  "token_ids": Form("token ids", ("input_ids",), ("loss_mask",)),
  "classes": Form("texts with labels", ("text", "label"), ("text_pair",)),
  "images": Form("images with labels", ("image", "label")),
  "text": Form("texts", ("text",)),
}
COLUMNS = tuple(dict.fromkeys(name for form in FORMS.values() for name in form.columns))


def find(
  tables: Mapping[str, Table],
  columns: Mapping[str, str],
  forms: Sequence[str],
  *,
  skip: bool = False,
) -> tuple[str, Mapping[str, Table]]:
  """The form of tables, and the tables with that form's columns alone, by its names.

  Args:
    columns: the file's own name of a form's column, where it has another: {"label":
      "sentiment"}.
    forms: keys of `FORMS` that are of use.
    skip: rows that lack a column of the form are left out, and listed.

  Raises:
    LoraxError: a name that is no form's, or no column of the file; columns that make
      no form, or one that is of no use here.
  """
  for name in columns:
    if name not in COLUMNS:
      raise LoraxError(unknown("column of a form in data.columns", name, COLUMNS))
  renamed = {split: _renamed(table, columns) for split, table in tables.items()}
  first = next(iter(renamed.values()))
  found = [n for n, form in FORMS.items() if set(form.needs) <= set(first.columns)]
  fitting = [name for name in found if name in forms]
  if not fitting:
    raise LoraxError(_no_form(first, found, forms))
  form = fitting[0]
  return form, {
    name: _only(table, FORMS[form], skip) for name, table in renamed.items()
  }


def _no_form(table: Table, found: Sequence[str], forms: Sequence[str]) -> str:
  wanted = "; ".join(
    f"{FORMS[name].title}: {' and '.join(FORMS[name].needs)}" for name in forms
  )
  has = f"{table.file} has the columns {listing(table.columns)}"
  if found:
    return (
      f"{has}, which are {FORMS[found[0]].title}, and this trains on others ({wanted})"
    )
  needed = [name for key in forms for name in FORMS[key].needs]
  close = {name: nearest(name, table.columns) for name in needed}
  name, other = next(((n, c[0]) for n, c in close.items() if c), (needed[-1], "NAME"))
  return (
    f"{has}, which make no form ({wanted}); name a column that is called otherwise, "
    f"as in --config.data.columns.{name}={other}"
  )


def _renamed(table: Table, columns: Mapping[str, str]) -> Table:
  """The table with the columns named as forms name them."""
  for name, own in columns.items():
    if own not in table.columns:
      raise LoraxError(
        f"data.columns.{name}: {table.file}: {unknown('column', own, table.columns)}"
      )
  # A column that is taken for another does not stand for its own name too.
  names = {own: name for name, own in columns.items()}
  hidden = set(columns) - set(names)

  def values(row: Row) -> dict[str, Any]:
    return {names.get(n, n): x for n, x in row.values.items() if n not in hidden}

  rows = [Row(row.place, values(row)) for row in table.rows]
  present = [names.get(n, n) for n in table.columns if n not in hidden]
  return dataclasses.replace(table, columns=tuple(present), rows=rows)


def _only(table: Table, form: Form, skip: bool) -> Table:
  """The table with a form's columns; each row has those that the form needs."""
  absent = [name for name in form.needs if name not in table.columns]
  if absent:
    raise LoraxError(
      f"{table.file} has no column {absent[0]!r}; there are: {listing(table.columns)}"
    )
  rows, bad = [], list(table.bad)
  for row in table.rows:
    values = {n: x for n, x in row.values.items() if n in form.columns}
    missing = [name for name in form.needs if values.get(name) is None]
    if not missing:
      rows.append(Row(row.place, {n: x for n, x in values.items() if x is not None}))
    elif skip:
      bad.append(Bad(row.place, f"has no {missing[0]}"))
    else:
      raise LoraxError(f"{table.file}: {row.place} has no {missing[0]}")
  columns = tuple(name for name in form.columns if name in table.columns)
  return dataclasses.replace(table, columns=columns, rows=rows, bad=tuple(bad))
