"""Text to text: a model with a decoder writes completions of a user's own prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorax_flax.data import pipeline
from lorax_flax.data.examples import Example
from lorax_flax.data.own import summary
from lorax_flax.data.own.splits import TRAIN, read_splits
from lorax_flax.data.own.table import Bad, Row, Table, text
from lorax_flax.data.own.usable import usable
from lorax_flax.data.pairs import Pairs, pairs
from lorax_flax.data.sequences import IGNORED
from lorax_flax.data.tokenize import load_tokenizer, tokenize, uncut_lengths
from lorax_flax.data.tokens import Column, Tokens, ragged
from lorax_flax.errors import LoraxError, prefixed
from lorax_flax.tasks import answers, perplexity
from lorax_flax.tasks.answers import AnswerSettings
from lorax_flax.tasks.task import OwnTask, Splits, Task
from lorax_flax.train.objective import Throughput

if TYPE_CHECKING:
  from lorax_flax.models.registry import Located, Outline

_NAME, _FORM = "seq2seq", "completion"
_EXAMPLES = 3  # that are shown
_COLUMNS = ("prompt", "completion")
_START = "decoder_start_token_id"


@dataclass(frozen=True)
class Seq2SeqSettings(AnswerSettings):
  """Settings of a user's own prompts and completions.

  Attributes:
    max_length: number of tokens that a prompt is truncated to.
    max_target_length: number of tokens that a completion is truncated to.
  """

  max_target_length: int = 128

  def __post_init__(self):
    super().__post_init__()
    if self.max_target_length < 2:
      raise LoraxError("data.max_target_length must be at least 2: the last ends it")


class _Split(NamedTuple):
  """Prompts and completions of a file, and the rows of it that are of no use."""

  table: Table
  bad: tuple[Bad, ...]
  prompts: list[Example]
  completions: list[Example]


class _Tokens(NamedTuple):
  """Tokens of a split, and the numbers of them before they were cut."""

  prompts: Tokens
  targets: Tokens
  prompt_lengths_N: np.ndarray
  target_lengths_N: np.ndarray


def _open(settings: Seq2SeqSettings) -> Task:
  """The task of the settings' files; raises LoraxError, which names file and line."""
  path = settings.required_path(
    "which file of prompts and completions, or which folder with train and validation "
    "files?"
  )
  tables = read_splits(path, settings.held_out, skip=settings.skips)
  chosen = usable(tables, settings, _FORM, _check)
  splits = {
    name: _Split(tables[name], table.bad, *(_column(table, n) for n in _COLUMNS))
    for name, table in chosen.items()
  }

  # They are read to be trained on, and again to be described.
  @functools.lru_cache(maxsize=1)
  def tokens(folder: Path) -> Mapping[str, _Tokens]:
    return {name: _tokenized(settings, split, folder) for name, split in splits.items()}

  return Task(
    name=_NAME,
    model="seq2seq-lm",
    num_labels=None,
    labels=None,
    settings=Seq2SeqSettings,
    read=lambda _, model: _read(settings, model, tokens(model.folder)),
    blank=functools.partial(_blank, settings),
    objective=perplexity.objective(
      lambda batch: batch["labels"],
      Throughput("tokens", {"attention_mask": 0, "labels": IGNORED}),
    ),
    samples=answers.samples,
    describe=lambda _, model: _describe(settings, splits, tokens(model.folder), model),
  )


def _check(table: Table, row: Row) -> None:
  for name in _COLUMNS:
    text(table, row, name)


def _column(table: Table, name: str) -> list[Example]:
  return [Example(text=text(table, row, name)) for row in table.rows]


def _tokenized(settings: Seq2SeqSettings, split: _Split, folder: Path) -> _Tokens:
  tokenizer = load_tokenizer(folder)
  eos, columns = tokenizer.id_of("eos_token"), []
  for examples, length in (
    (split.prompts, settings.max_length),
    (split.completions, settings.max_target_length),
  ):
    with prefixed(str(split.table.file)):
      made = tokenize(examples, tokenizer, max_length=length, token_types=False)
    columns.append((made, uncut_lengths(made, examples, tokenizer, length)))
  (prompts, prompt_lengths_N), (targets, target_lengths_N) = columns
  if (targets.input_ids_S[targets.offsets[1:] - 1] != eos).any():
    raise LoraxError(
      f"the tokenizer in {folder} ends no text with its eos_token, by which a "
      "completion ends: its post_processor in tokenizer.json has to add it"
    )
  return _Tokens(prompts, targets, prompt_lengths_N, target_lengths_N)


def _start_id(settings: Seq2SeqSettings, model: Outline) -> int:
  """The decoder's first input, of a model that has room for the completions."""
  if settings.max_target_length > model.max_length:
    raise LoraxError(
      f"data.max_target_length is {settings.max_target_length}, and this model takes "
      f"at most {model.max_length} tokens"
    )
  start_id = model.hf_config.get(_START)
  if not isinstance(start_id, int):
    raise LoraxError(
      f"config.json has no {_START}, the decoder's first input; T5's is its "
      "pad_token_id, 0"
    )
  return start_id


def _read(
  settings: Seq2SeqSettings, model: Located, tokens: Mapping[str, _Tokens]
) -> Splits:
  start_id, lengths = _start_id(settings, model), _padded_lengths(settings, tokens)
  rows = {
    name: pairs(
      split.prompts,
      Column(split.targets.input_ids_S, split.targets.offsets),
      start_id,
      lengths,
    )
    for name, split in tokens.items()
  }
  return Splits(rows.pop(TRAIN), rows)


def _padded_lengths(
  settings: Seq2SeqSettings, tokens: Mapping[str, _Tokens]
) -> tuple[int, ...]:
  """Padded lengths of completions."""
  lengths = [each.targets.lengths_N for each in tokens.values()]
  return pipeline.choose_buckets(np.concatenate(lengths), settings.buckets)


def _blank(settings: Seq2SeqSettings, model: Outline, length: int) -> Pairs:
  """One row of the longest prompt and completion, for its shapes."""
  longest = pipeline.choose_buckets(np.array([settings.max_target_length]), 1)
  ids_S, offsets = ragged([np.zeros(length, np.int32)])
  targets = Column(*ragged([np.zeros(settings.max_target_length, np.int32)]))
  tokens = Tokens(ids_S, offsets, pad_id=0)
  return pairs(tokens, targets, _start_id(settings, model), longest)


def _describe(
  settings: Seq2SeqSettings,
  splits: Mapping[str, _Split],
  tokens: Mapping[str, _Tokens],
  model: Located,
) -> list[str]:
  """Lines about files, lengths and padding, and examples with what is learnt marked."""
  _start_id(settings, model)
  tokenizer, train = load_tokenizer(model.folder), tokens[TRAIN]
  lengths = _padded_lengths(settings, tokens)
  padding = pipeline.padding_share(train.targets.lengths_N, lengths)
  lines = [
    *summary.of_files(
      {name: split.table for name, split in splits.items()}, _FORM, settings.columns
    ),
    *summary.of_skipped((split.table.file, split.bad) for split in splits.values()),
    summary.of_lengths(
      np.concatenate([each.prompt_lengths_N for each in tokens.values()]),
      settings.max_length,
      "prompt",
    ),
    summary.of_lengths(
      np.concatenate([each.target_lengths_N for each in tokens.values()]),
      settings.max_target_length,
      "completion",
      "data.max_target_length",
    ),
    f"completions are padded to {' or '.join(map(str, lengths))} tokens, of which "
    f"{padding:.1%} is padding; they are learnt, and are in ⟦…⟧ below",
  ]
  for number in range(min(_EXAMPLES, len(train.prompts))):
    prompt, target = (
      tokenizer.decode(
        rows.part(number, number + 1).input_ids_S.tolist(), skip_special_tokens=False
      )
      for rows in (train.prompts, train.targets)
    )
    lines.append(f"example: {prompt} -> ⟦{target}⟧")
  return lines


TASK = OwnTask(_NAME, Seq2SeqSettings, _open)
