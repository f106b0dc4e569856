"""Classification or regression of a user's own texts, or pairs of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorax_flax.data.examples import Example
from lorax_flax.data.own import labels as own_labels
from lorax_flax.data.own import summary
from lorax_flax.data.own.labels import CLASSES, KINDS, NUMBER, SEVERAL, Labels
from lorax_flax.data.own.settings import OwnSettings
from lorax_flax.data.own.splits import TRAIN, read_splits
from lorax_flax.data.own.table import Row, Table, text
from lorax_flax.data.own.usable import usable
from lorax_flax.data.tokenize import load_tokenizer, tokenize, uncut_lengths
from lorax_flax.data.tokens import Tokens
from lorax_flax.errors import check_known, prefixed
from lorax_flax.tasks.classification import blank
from lorax_flax.tasks.regression import unsmoothed
from lorax_flax.tasks.task import OwnTask, Splits, Task
from lorax_flax.train import losses
from lorax_flax.train.losses import Loss
from lorax_flax.train.objective import TOKENS, Objective
from lorax_flax.train.report import of_classes

if TYPE_CHECKING:
  from lorax_flax.models.registry import Located

_NAME, _FORM = "texts", "classes"
_EXAMPLES = 3  # that are shown


@dataclass(frozen=True)
class TextsSettings(OwnSettings):
  """Settings of a user's own texts with labels.

  Attributes:
    labels: "classes", "number" (a regression) or "several" (classes at once, in a list
      or separated by commas); None finds it in the labels.
  """

  labels: str | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.labels is not None:
      check_known("data.labels", self.labels, KINDS)


class _Found(NamedTuple):
  """A user's data.

  Attributes:
    tables: by split, as in the files.
    chosen: the same, with the rows that are of use.
    examples: by split.
    labels: of all splits.
  """

  tables: Mapping[str, Table]
  chosen: Mapping[str, Table]
  examples: Mapping[str, list[Example]]
  labels: Labels


def _open(settings: TextsSettings) -> Task:
  """The task of the settings' files; raises LoraxError, which names file and line."""
  path = settings.required_path(
    "which file of texts and labels, or which folder with train and validation files?"
  )
  tables = read_splits(path, settings.held_out, skip=settings.skips)
  check = functools.partial(_check, kind=settings.labels)
  chosen = usable(tables, settings, _FORM, check)
  examples = {
    split: [_example(table, row) for row in table.rows]
    for split, table in chosen.items()
  }
  found = _Found(tables, chosen, examples, own_labels.find(chosen, settings.labels))
  labels = found.labels
  # They are read to be trained on, and again to be described.
  rows = functools.lru_cache(maxsize=1)(functools.partial(_tokens, found))

  def blank_row(model, length: int) -> Tokens:
    zero = np.zeros_like(labels.values[TRAIN][:1])
    return dataclasses.replace(blank(model, length), labels_N=zero)

  return Task(
    name=_NAME,
    model="sequence-classification",
    num_labels=len(labels.names),
    labels=labels.names,
    settings=TextsSettings,
    read=functools.partial(_read, rows),
    blank=blank_row,
    objective=functools.partial(_objective, labels),
    problem_type="multi_label_classification" if labels.kind == SEVERAL else None,
    describe=functools.partial(_describe, found, rows),
  )


def _check(table: Table, row: Row, kind: str | None) -> None:
  _example(table, row)
  own_labels.check(table, row, kind)


def _example(table: Table, row: Row) -> Example:
  pair = text(table, row, "text_pair") if "text_pair" in row.values else None
  return Example(text=text(table, row, "text"), text_pair=pair)


# Loss, metrics, and which of these picks the best evaluation.
_JUDGED: Mapping[str, tuple[Callable[[float], Loss], tuple[str, ...], str]] = {
  CLASSES: (losses.cross_entropy, ("accuracy", "macro_f1"), "accuracy"),
  NUMBER: (
    unsmoothed(_NAME, losses.squared_error),
    ("pearson", "spearman"),
    "eval_loss",
  ),
  SEVERAL: (
    unsmoothed(_NAME, losses.binary_cross_entropy),
    ("micro_f1", "macro_f1", "exact_match"),
    "micro_f1",
  ),
}


def _objective(labels: Labels, label_smoothing: float) -> Objective:
  loss, metrics, primary = _JUDGED[labels.kind]
  return Objective(
    loss(label_smoothing),
    metrics,
    primary,
    throughput=TOKENS,
    report=None if labels.kind == NUMBER else of_classes(labels.names),
  )


# (folder of the model, whether it has token types, max_length) -> rows by split
_Rows = Callable[[Path, bool, int], Mapping[str, Tokens]]


def _tokens(
  found: _Found, folder: Path, token_types: bool, max_length: int
) -> Mapping[str, Tokens]:
  tokenizer, rows = load_tokenizer(folder), {}
  for split, examples in found.examples.items():
    with prefixed(f"{found.tables[split].file}, {split}"):
      tokens = tokenize(
        examples, tokenizer, max_length=max_length, token_types=token_types
      )
    rows[split] = dataclasses.replace(tokens, labels_N=found.labels.values[split])
  return rows


def _read(rows: _Rows, settings: TextsSettings, model: Located) -> Splits:
  by_split = dict(rows(model.folder, model.token_types, settings.max_length))
  return Splits(by_split.pop(TRAIN), by_split)


def _describe(
  found: _Found, rows: _Rows, settings: TextsSettings, model: Located
) -> list[str]:
  """Lines about files, labels and lengths, and examples in tokens."""
  most = settings.max_length
  by_split = rows(model.folder, model.token_types, most)
  tokenizer, lengths = load_tokenizer(model.folder), []
  for split, tokens in by_split.items():
    lengths.append(uncut_lengths(tokens, found.examples[split], tokenizer, most))
  train, examples = by_split[TRAIN], []
  for number in range(min(_EXAMPLES, len(train))):
    ids = train.part(number, number + 1).input_ids_S
    shown = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    examples.append(f"example: {shown} -> {_label(found.labels, number)}")
  return [
    *summary.of_files(found.tables, _FORM, settings.columns),
    *summary.of_skipped((table.file, table.bad) for table in found.chosen.values()),
    *summary.of_labels(found.labels),
    summary.of_lengths(np.concatenate(lengths), most),
    *examples,
  ]


def _label(labels: Labels, number: int) -> str:
  """The label of a row to train on."""
  value = labels.values[TRAIN][number]
  if labels.kind == NUMBER:
    return f"{value:g}"
  if labels.kind == CLASSES:
    return labels.names[value]
  names = [name for name, has in zip(labels.names, value, strict=True) if has]
  return ", ".join(names) or "no class"


TASK = OwnTask(_NAME, TextsSettings, _open)
