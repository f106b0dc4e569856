"""A user's files as rows of token ids, by the form that their columns have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from lorax_flax.data import chat
from lorax_flax.data.chat.masks import Learn
from lorax_flax.data.language import encoding
from lorax_flax.data.language.encoding import Outcomes
from lorax_flax.data.language.gather import Gathered, gather
from lorax_flax.data.own import forms, splits
from lorax_flax.data.own.table import Table
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.tasks.causal_lm.settings import TextSettings

if TYPE_CHECKING:
  from lorax_flax.models.registry import Located

TOKEN_IDS = "token_ids"


class Found(NamedTuple):
  """The content of a user's files.

  Attributes:
    form: a key of `forms.FORMS`.
    tables: by split, as in the files.
    rows: by split.
  """

  form: str
  tables: Mapping[str, Table]
  rows: Mapping[str, Gathered]


def read(settings: TextSettings, model: Located) -> Found:
  """Reads and encodes every split.

  Raises:
    LoraxError: files, columns or rows that can't be used, named.
  """
  path = settings.required_path(
    "which file, or folder with train and validation files, is to be read?"
  )
  if settings.max_length < 2:
    raise LoraxError("data.max_length must be at least 2: a token follows from another")
  tables = splits.read_splits(path, settings.held_out, skip=settings.skips)
  form, chosen = forms.find(
    tables, settings.columns, tuple(_ENCODE), skip=settings.skips
  )
  if form == TOKEN_IDS:
    for table in tables.values():
      _check_names(settings, table)
  rows = {
    split: gather(
      table.file,
      itertools.chain(_unread(table), _ENCODE[form](settings, model.folder, table)),
      max_length=settings.max_length,
      vocab_size=model.config.vocab_size,
      pad_id=getattr(model.config, "pad_token_id", None) or 0,
      skip=settings.skips,
    )
    for split, table in chosen.items()
  }
  return Found(form, tables, rows)


def _unread(table: Table) -> Outcomes:
  return ((bad.place, LoraxError(bad.why)) for bad in table.bad)


def _check_names(settings: TextSettings, table: Table) -> None:
  """Refuses other columns beside token ids: a mask by another name is not read."""
  known = forms.FORMS[TOKEN_IDS].columns
  own = {settings.columns.get(name, name) for name in known}
  for name in table.columns:
    if name not in own:
      place = next(row.place for row in table.rows if name in row.values)
      raise LoraxError(f"{table.file}: {place}: {unknown('name', name, known)}")


def _chats(settings: TextSettings, folder: Path, table: Table) -> Outcomes:
  template = chat.of_model(folder, settings.chat_template)
  tokenizer = load_tokenizer(folder)
  return encoding.chats(table.rows, tokenizer, template, cast(Learn, settings.learn))


def _completions(settings: TextSettings, folder: Path, table: Table) -> Outcomes:
  return encoding.completions(table.rows, load_tokenizer(folder))


def _texts(settings: TextSettings, folder: Path, table: Table) -> Outcomes:
  outcomes = encoding.texts(table.rows, load_tokenizer(folder))
  if settings.documents == "rows":
    return outcomes
  return encoding.windows(outcomes, settings.max_length)


def _token_ids(settings: TextSettings, folder: Path, table: Table) -> Outcomes:
  return encoding.token_ids(table.rows)


# By the form's key in `forms.FORMS`.
_ENCODE: Mapping[str, Callable[[TextSettings, Path, Table], Outcomes]] = {
  "chat": _chats,
  "completion": _completions,
  "token_ids": _token_ids,
  "text": _texts,
}
