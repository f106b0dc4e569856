"""Causal language modelling: texts, chats and token ids of a user's own files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jax

from lorax_flax.data import chat, pipeline, sequences
from lorax_flax.data.chat.masks import Learn
from lorax_flax.data.config import DataSettings
from lorax_flax.data.language import encoding
from lorax_flax.data.language.encoding import Outcomes
from lorax_flax.data.language.gather import Gathered, gather
from lorax_flax.data.own import forms, splits
from lorax_flax.data.own.table import Table
from lorax_flax.data.packing import pack
from lorax_flax.data.sequences import Sequences
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.errors import LoraxError, check_known, unknown
from lorax_flax.models.head import Head
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train import losses
from lorax_flax.train.objective import Objective, Throughput
from lorax_flax.train.token_scores import TokenScores, next_labels, token_scores

if TYPE_CHECKING:
  from lorax_flax.models.registry import Loaded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSettings(DataSettings):
  """Settings of a language model's own data.

  Attributes:
    path: a file, or a folder with train.* and validation.* (or test.*): .jsonl, .json,
      .csv, .tsv or .parquet. Its columns are messages (chats), prompt and completion,
      text (documents), or input_ids and, where not all are learnt, loss_mask.
    columns: the file's own name of a column, where it has another, as in
      data.columns.text=body.
    held_out: share of a single file's rows that are held out to evaluate.
    bad_rows: "error" for a row that can't be used, or "skip", which counts them.
    documents: "windows" cuts texts one after another into rows of max_length tokens;
      "rows" has one row for each text.
    chat_template: a .jinja file in place of the model's own template.
    learn: "all" assistant turns of a chat, or the "last".
    packing: puts several rows to train on into one of up to max_length tokens; each
      attends to itself alone.
  """

  path: str | None = None
  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
  held_out: float = 0.1
  bad_rows: str = "error"
  documents: str = "windows"
  chat_template: str | None = None
  learn: str = "all"
  packing: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, known in _CHOICES.items():
      check_known(f"data.{name}", getattr(self, name), known)
    if not 0 < self.held_out < 1:
      raise LoraxError(f"data.held_out is a share above 0, below 1: {self.held_out}")


_CHOICES = {
  "bad_rows": ("error", "skip"),
  "documents": ("windows", "rows"),
  "learn": ("all", "last"),
}


def _objective(label_smoothing: float) -> Objective:
  """Cross entropy of the next token; loss and perplexity are means over tokens."""
  return Objective(
    loss=losses.next_token(label_smoothing),
    eval_loss=losses.next_token(),  # A perplexity is of the loss without smoothing.
    metrics=("perplexity",),
    primary="perplexity",
    predictions=lambda scores: None,
    throughput=Throughput("tokens", "attention_mask"),
    readout=_scores,
  )


def _scores(head: Head, x_BxTxD: jax.Array, batch: losses.Batch) -> TokenScores:
  return token_scores(head, x_BxTxD, next_labels(batch["labels"]))


def _chats(settings: TextSettings, model: Loaded, table: Table) -> Outcomes:
  if settings.chat_template is None:
    template = chat.template(model.folder)
  else:
    own = Path(settings.chat_template).expanduser()
    template = chat.template(own, special_tokens=chat.special_tokens(model.folder))
  tokenizer = load_tokenizer(model.folder)
  return encoding.chats(table.rows, tokenizer, template, cast(Learn, settings.learn))


def _completions(settings: TextSettings, model: Loaded, table: Table) -> Outcomes:
  return encoding.completions(table.rows, load_tokenizer(model.folder))


def _texts(settings: TextSettings, model: Loaded, table: Table) -> Outcomes:
  outcomes = encoding.texts(table.rows, load_tokenizer(model.folder))
  if settings.documents == "rows":
    return outcomes
  return encoding.windows(outcomes, settings.max_length)


def _token_ids(settings: TextSettings, model: Loaded, table: Table) -> Outcomes:
  return encoding.token_ids(table.rows)


# By the form's key in `forms.FORMS`.
_ENCODE: Mapping[str, Callable[[TextSettings, Loaded, Table], Outcomes]] = {
  "chat": _chats,
  "completion": _completions,
  "token_ids": _token_ids,
  "text": _texts,
}


def _read(settings: TextSettings, model: Loaded) -> Splits:
  if settings.path is None:
    raise LoraxError(
      "data.path: which file, or folder with train and validation files, is to be read?"
    )
  if settings.max_length < 2:
    raise LoraxError("data.max_length must be at least 2: a token follows from another")
  tables = splits.read_splits(settings.path, settings.held_out)
  form, kept = forms.find(tables, settings.columns, tuple(_ENCODE))
  for name, table in tables.items():
    _check_unread(form, settings, table, kept[name])
  found = {}
  for name, table in kept.items():
    gathered = gather(
      table.file,
      _ENCODE[form](settings, model, table),
      max_length=settings.max_length,
      vocab_size=model.config.vocab_size,
      pad_id=getattr(model.config, "pad_token_id", None) or 0,
      skip=settings.bad_rows == "skip",
    )
    for line in _notes(gathered, settings.max_length):
      log.info(line)
    found[name] = gathered.rows
  return Splits(_packed(found.pop(splits.TRAIN), settings), found)


def _packed(rows: Sequences, settings: TextSettings) -> Sequences:
  """The rows to train on, packed where asked; evaluations count examples."""
  log.info(f"{_padding(rows, settings)} of what is trained on is padding")
  if not settings.packing:
    return rows
  packs = pack(rows, settings.max_length)
  log.info(
    f"packed: {len(rows):,} rows in {len(packs):,}, of which "
    f"{_padding(packs, settings)} is padding"
  )
  return packs


def _padding(rows: Sequences, settings: TextSettings) -> str:
  buckets = pipeline.choose_buckets(rows.lengths_N, settings.buckets)
  return f"{pipeline.padding_share(rows.lengths_N, buckets):.1%}"


def _check_unread(form: str, settings: TextSettings, table: Table, kept: Table) -> None:
  """Logs columns that are not read; among token ids there are no others."""
  used = {settings.columns.get(name, name) for name in kept.columns}
  unread = [name for name in table.columns if name not in used]
  if unread and form == "token_ids":
    place = next(row.place for row in table.rows if unread[0] in row.values)
    known = forms.FORMS[form].columns
    raise LoraxError(f"{table.file}: {place}: {unknown('name', unread[0], known)}")
  if unread:
    log.info(f"{table.file}: not read: {', '.join(unread)}")


def _notes(found: Gathered, max_length: int) -> list[str]:
  """Lines on what is cut and skipped, where anything is."""
  lines = []
  if found.cut.rows:
    total = len(found.rows.labels_S) + found.cut.tokens
    lines.append(
      f"{found.file}: {found.cut.rows:,} of {len(found.rows):,} examples are cut to "
      f"data.max_length = {max_length} tokens; {found.cut.tokens:,} of {total:,} "
      "tokens are left out"
    )
  lines += [
    f"{found.file}: {number:,} rows are skipped: {why}"
    for why, number in found.skipped.items()
  ]
  return lines


TASK = Task(
  name="next_token",
  model="causal-lm",
  num_labels=None,
  labels=None,
  settings=TextSettings,
  read=_read,
  blank=lambda model, length: sequences.blank(length),
  objective=_objective,
)
