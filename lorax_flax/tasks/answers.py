"""Answers to the first rows of what is evaluated, while a language model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax_flax.data.own.settings import OwnSettings
from lorax_flax.data.pairs import Pairs
from lorax_flax.data.sequences import IGNORED, Sequences
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.errors import LoraxError
from lorax_flax.train.samples import Samples

if TYPE_CHECKING:
  from lorax_flax.data.examples import Splits
  from lorax_flax.data.pipeline import Rows
  from lorax_flax.methods import Adapter
  from lorax_flax.models.registry import Loaded

# Tokens of a text that are given as its prompt, where all of it is learnt.
_BEGINNING = 32


@dataclass(frozen=True)
class AnswerSettings(OwnSettings):
  """Settings of answers that are written while training.

  Attributes:
    prompts: number of the first rows to evaluate that are answered before training and
      at each evaluation, greedily; 0 for none.
    max_new_tokens: largest number of tokens of such an answer.
  """

  prompts: int = 3
  max_new_tokens: int = 64

  def __post_init__(self):
    super().__post_init__()
    for name, least in (("prompts", 0), ("max_new_tokens", 1)):
      if getattr(self, name) < least:
        value = getattr(self, name)
        raise LoraxError(f"data.{name} must be at least {least}, not {value}")


class _Row(NamedTuple):
  """Token ids of a prompt, and of what follows it in the data."""

  prompt: list[int]
  expected: list[int]


def samples(
  settings: AnswerSettings, model: Loaded, splits: Splits[Rows]
) -> Samples | None:
  """The prompts of a run, and what answers them; None where none are requested.

  A prompt is the beginning of a row, up to the first token that is learnt; where all of
  it is, half of it at most.

  Raises:
    LoraxError: the model can't write, or has no room after any prompt.
  """
  # Here, since --help and mistakes in flags need not wait for them.
  from lorax_flax.serve import generate as generation
  from lorax_flax.serve.settings import Decoding

  if not settings.prompts:
    return None
  most = model.max_length
  rows = [
    row
    for row, _ in zip(
      (row for row in _rows(splits) if len(row.prompt) < most),
      range(settings.prompts),
      strict=False,
    )
  ]
  if not rows:
    raise LoraxError(f"no prompt has less than the {most} tokens that the model takes")
  new = settings.max_new_tokens
  if not generation.has_encoder(model):
    new = min(new, most - max(len(row.prompt) for row in rows))
  try:
    tokenizer = load_tokenizer(model.folder)
  except LoraxError:
    tokenizer = None  # Rows of token ids need none.
  writer = generation.writer(model, {}, tokenizer)
  prompts = [row.prompt for row in rows]
  decoding = Decoding(max_new_tokens=new)

  def answer(params: Any, adapter: Adapter) -> list[str]:
    own = dataclasses.replace(writer, params=(params, adapter))
    found = dict(generation.generate(own, prompts, decoding, batch_size=len(prompts)))
    each = [found[number] for number in range(len(prompts))]
    return [_numbers(x.ids) if x.text is None else x.text for x in each]

  def text(ids: Sequence[int], skip_special_tokens: bool) -> str:
    if tokenizer is None:
      return _numbers(ids)
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

  return Samples(
    [text(row.prompt, skip_special_tokens=False) for row in rows],
    [text(row.expected[:new], skip_special_tokens=True) for row in rows],
    answer,
  )


def _numbers(ids: Sequence[int]) -> str:
  return " ".join(map(str, ids))


def _rows(splits: Splits[Rows]) -> Iterator[_Row]:
  """The rows of what is evaluated, in order."""
  for split in splits.evaluation.values():
    split_row = _of_pair if isinstance(split, Pairs) else _of_sequence
    for number in range(len(split)):
      yield split_row(split, number)


def _of_pair(rows: Any, number: int) -> _Row:
  pairs: Pairs = rows
  targets = pairs.targets
  start, end = targets.offsets[number : number + 2]
  prompt = pairs.tokens.part(number, number + 1).input_ids_S
  return _Row(prompt.tolist(), targets.values_S[start:end].tolist())


def _of_sequence(rows: Any, number: int) -> _Row:
  sequences: Sequences = rows
  place = slice(*sequences.tokens.offsets[number : number + 2])
  ids_T = sequences.tokens.input_ids_S[place]
  learnt_T = sequences.labels_S[place] != IGNORED
  learnt_T[:1] = False
  # Where the learnt tokens begin, and where they end for the first time.
  start = int(learnt_T.argmax())
  after_T = np.append(~learnt_T[start:], True)
  end = start + int(after_T.argmax())
  if start == 1:
    start = max(1, min(len(ids_T) // 2, _BEGINNING))
  return _Row(ids_T[:start].tolist(), ids_T[start:end].tolist())
