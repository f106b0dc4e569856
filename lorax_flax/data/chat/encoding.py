"""Chats to token ids, and to the mask of those that are learnt."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from lorax_flax.data.chat import messages
from lorax_flax.data.chat.masks import Learn, Marked, mark, markers
from lorax_flax.data.chat.templates import ChatTemplate
from lorax_flax.errors import LoraxError

Row = Sequence[Any] | Mapping[str, Any]
Encoded = tuple[np.ndarray, np.ndarray]
_CHUNK = 256  # chats that go to the tokenizer's threads at once


def encode(
  chat: Row,
  tokenizer: tokenizers.Tokenizer,
  template: ChatTemplate,
  *,
  learn: Learn = "all",
  example: int = 1,
) -> Encoded:
  """`encode_all` of one chat, whose number in the data is `example`."""
  return next(encode_all([chat], tokenizer, template, learn=learn, first=example))


def encode_all(
  chats: Iterable[Row],
  tokenizer: tokenizers.Tokenizer,
  template: ChatTemplate,
  *,
  learn: Learn = "all",
  first: int = 1,
) -> Iterator[Encoded]:
  """Renders, marks and tokenises chats.

  Args:
    chats: rows as `messages.check` takes them.
    tokenizer: without truncation and padding. Its special tokens are not added, since
      the template writes them.
    template: of the model.
    learn: "all" assistant turns, or only the "last" one.
    first: number of the first chat, for errors.

  Yields:
    Of each chat, input_ids (int32, length S) and loss_mask (bool, length S): True for
    tokens that the model is to produce.

  Raises:
    LoraxError: a chat that can't be used, with its number and its message's.
  """
  found = markers(tokenizer, template)

  def marked(number: int, row: Row) -> Marked:
    try:
      return mark(template, messages.check(row), found, learn=learn)
    except LoraxError as error:
      raise LoraxError(f"example {number}: {error}") from error

  rows = enumerate(chats, first)
  while chunk := list(itertools.islice(rows, _CHUNK)):
    yield from tokenize([marked(*row) for row in chunk], tokenizer)


def tokenize(
  chats: Sequence[Marked],
  tokenizer: tokenizers.Tokenizer,
  *,
  add_special_tokens: bool = False,
) -> Iterator[Encoded]:
  """Tokenises each text in one piece, and takes its spans to tokens.

  A token is learnt that overlaps a learnt span, by its offsets in the text.
  """
  texts = [chat.text for chat in chats]
  try:
    # Not encode_batch_fast, which finds no offsets.
    encodings = tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
  # The tokenizers library raises bare Exception where its file is incomplete.
  except Exception as error:
    raise LoraxError(f"this tokenizer can't encode the texts: {error}") from error
  for chat, encoding in zip(chats, encodings, strict=True):
    ids = np.asarray(encoding.ids, np.int32)
    yield ids, _overlaps(np.asarray(encoding.offsets).reshape(-1, 2), chat.spans)


def _overlaps(offsets_Sx2: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
  starts, ends = np.asarray(spans).T
  # The first span that ends behind the token's start.
  place_S = np.searchsorted(ends, offsets_Sx2[:, 0], side="right")
  inside_S = place_S < len(ends)
  place_S = np.minimum(place_S, len(ends) - 1)
  return inside_S & (starts[place_S] < offsets_Sx2[:, 1])
