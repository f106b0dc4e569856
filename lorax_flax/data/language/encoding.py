"""Rows of each form as token ids, and those of them that are learnt.

A row that can't be used yields its error, so that the caller may count it or raise it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax_flax.data import chat
from lorax_flax.data.chat.masks import Learn, Marked
from lorax_flax.data.chat.templates import ChatTemplate
from lorax_flax.data.own.table import Row
from lorax_flax.data.tokenize import check_characters
from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.data.tokens import integers
from lorax_flax.errors import LoraxError

_CHUNK = 256  # rows that go to the tokenizer's threads at once
_IDS, _MASK = "input_ids", "loss_mask"
_EOS = "eos_token"


class Encoded(NamedTuple):
  """Token ids int32 (T,), and bool (T,): True where a token is learnt."""

  ids_T: np.ndarray
  learnt_T: np.ndarray


# The place of each row, and what was made of it.
Outcomes = Iterable[tuple[str, Encoded | LoraxError]]


def chats(
  rows: Sequence[Row], tokenizer: Tokenizer, template: ChatTemplate, learn: Learn
) -> Outcomes:
  """Chats by a template; assistant turns are learnt, "all" or the "last" of each."""
  markers = chat.markers(tokenizer.backend, template)

  def mark(values: Mapping[str, Any]) -> Marked:
    return chat.mark(template, chat.check(values), markers, learn=learn)

  return _tokenized(rows, mark, tokenizer, add_special_tokens=False)


def completions(rows: Sequence[Row], tokenizer: Tokenizer) -> Outcomes:
  """Prompts, each with its completion behind it and an EOS; these two are learnt.

  Both are one text to the tokenizer, as the model sees it. A token that reaches over
  the boundary is learnt.
  """
  eos = _eos(tokenizer)

  def mark(values: Mapping[str, Any]) -> Marked:
    prompt = _text(values, "prompt")
    text = prompt + _text(values, "completion", filled=True)
    return Marked(text, [(len(prompt), len(text))])

  outcomes = _tokenized(rows, mark, tokenizer, add_special_tokens=True)
  return _each(outcomes, lambda made: _ended(made, eos))


def texts(rows: Sequence[Row], tokenizer: Tokenizer) -> Outcomes:
  """Documents, each with an EOS behind it; all tokens are learnt."""
  eos = _eos(tokenizer)

  def mark(values: Mapping[str, Any]) -> Marked:
    text = _text(values, "text", filled=True)
    return Marked(text, [(0, len(text))])

  outcomes = _tokenized(rows, mark, tokenizer, add_special_tokens=True)
  return _each(outcomes, lambda made: _all_learnt(_ended(made, eos)))


def token_ids(rows: Sequence[Row]) -> Outcomes:
  """Rows that are token ids; `loss_mask`, where there is one, is 1 for learnt ones."""
  for row in rows:
    try:
      yield row.place, _of_ids(row.values)
    except LoraxError as error:
      yield row.place, error


def windows(outcomes: Outcomes, length: int) -> Outcomes:
  """Documents one after another, cut into rows of `length` tokens.

  A row starts with the token that the one before ended with, since a row's first token
  is never predicted: every token but the very first is predicted once.
  """
  ids_S, place, made = np.zeros(0, np.int32), "", 0
  for place, document in outcomes:
    if isinstance(document, LoraxError):
      yield place, document
      continue
    ids_S = np.concatenate([ids_S, document.ids_T])
    while len(ids_S) >= length:
      made += 1
      yield place, _all_learnt(Encoded(ids_S[:length], ids_S[:length]))
      ids_S = ids_S[length - 1 :]
  if len(ids_S) > 1 or (len(ids_S) and not made):
    yield place, _all_learnt(Encoded(ids_S, ids_S))


def _tokenized(
  rows: Iterable[Row],
  mark: Callable[[Mapping[str, Any]], Marked],
  tokenizer: Tokenizer,
  *,
  add_special_tokens: bool,
) -> Outcomes:
  def marked(row: Row) -> tuple[str, Marked | LoraxError]:
    try:
      made = mark(row.values)
      check_characters(made.text)
      return row.place, made
    except LoraxError as error:
      return row.place, error

  source = iter(rows)
  while made := [marked(row) for row in itertools.islice(source, _CHUNK)]:
    good = [each for _, each in made if isinstance(each, Marked)]
    encoded = chat.tokenize(
      good, tokenizer.backend, add_special_tokens=add_special_tokens
    )
    for place, each in made:
      yield place, Encoded(*next(encoded)) if isinstance(each, Marked) else each


def _each(outcomes: Outcomes, change: Callable[[Encoded], Encoded]) -> Iterator:
  for place, each in outcomes:
    yield place, each if isinstance(each, LoraxError) else change(each)


def _text(values: Mapping[str, Any], name: str, *, filled: bool = False) -> str:
  value = values[name]
  if not isinstance(value, str):
    raise LoraxError(f"{name} is a text, not {value!r:.80}")
  if filled and not value:
    raise LoraxError(f"{name} is empty")
  return value


def _eos(tokenizer: Tokenizer) -> int:
  found = tokenizer.id_of(_EOS)
  if found is None:
    raise LoraxError(
      f"the tokenizer has no {_EOS}, by which a text ends: name it in its "
      "tokenizer_config.json"
    )
  return found


def _ended(made: Encoded, eos: int) -> Encoded:
  """The row with one EOS at its end, learnt; some tokenizers have written it."""
  if len(made.ids_T) and made.ids_T[-1] == eos:
    made = Encoded(made.ids_T[:-1], made.learnt_T[:-1])
  ids_T = np.append(made.ids_T, np.int32(eos))
  return Encoded(ids_T, np.append(made.learnt_T, True))


def _all_learnt(made: Encoded) -> Encoded:
  return made._replace(learnt_T=np.ones(len(made.ids_T), bool))


def _of_ids(values: Mapping[str, Any]) -> Encoded:
  ids_T = np.array(integers(values, _IDS), np.int32)
  if _MASK not in values:
    return Encoded(ids_T, np.ones(len(ids_T), bool))
  mask_T = np.array(integers(values, _MASK), np.int32)
  wrong = mask_T[(mask_T < 0) | (mask_T > 1)]
  if len(wrong):
    raise LoraxError(f"{_MASK} has {wrong[0]}, and goes from 0 to 1")
  if len(mask_T) != len(ids_T):
    raise LoraxError(f"{_MASK} has {len(mask_T)} values, {_IDS} {len(ids_T)}")
  return Encoded(ids_T, mask_T == 1)
