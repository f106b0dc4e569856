"""Splits tokenised with a checkpoint's own tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from rich.progress import track

from lorax_flax.data.examples import Example
from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.data.tokenizers.tokenizer import load as load_tokenizer
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.errors import LoraxError, prefixed

__all__ = ["load_tokenizer", "tokenize", "uncut_lengths"]

# Texts that go to the tokenizer's threads at once.
_CHUNK = 2048
# Fewer examples than this take about a second, and need no progress bar.
_LONG = 20_000
_NO_LIMIT = 1 << 30


def tokenize(
  examples: Sequence[Example],
  tokenizer: Tokenizer,
  *,
  max_length: int,
  token_types: bool,
  regression: bool = False,
  description: str = "Tokenising",
) -> Tokens:
  """Tokenises a split once.

  Args:
    examples: texts or pairs of texts; labels in all of them, or in none.
    tokenizer: of `load_tokenizer`.
    max_length: ids beyond this number, special tokens included, are cut off, from the
      longer text of a pair first.
    token_types: whether the model has more than one token type.
    regression: labels are float32 numbers, not int32 classes.
    description: of the progress bar, which only a long split has.

  Returns:
    Tokens, row i being example i.

  Raises:
    LoraxError: an example without text, some labels missing, or a max_length without
      room for text.
  """
  pair = any(example.get("text_pair") is not None for example in examples)
  special = tokenizer.backend.num_special_tokens_to_add(pair)
  if max_length <= special:
    raise LoraxError(
      f"max_length {max_length} leaves no room for text beside {special} special tokens"
    )
  cutter = tokenizer.truncated(max_length)
  texts = [_text(number, example) for number, example in enumerate(examples, 1)]
  starts: Any = range(0, len(texts), _CHUNK)
  if len(texts) > _LONG:
    starts = track(starts, description=f"{description} {len(texts):,}")
  ids, types = [], []
  for start in starts:
    for encoding in _encoded(cutter, texts[start : start + _CHUNK]):
      ids.append(np.asarray(encoding.ids, np.int32))
      if token_types:
        types_T = np.asarray(encoding.type_ids, np.int32)
        types.append(types_T if tokenizer.token_types else np.zeros_like(types_T))
  ids_S, offsets = ragged(ids)
  return Tokens(
    input_ids_S=ids_S,
    offsets=offsets,
    pad_id=tokenizer.pad_id,
    token_type_ids_S=ragged(types)[0] if token_types else None,
    labels_N=_labels(examples, np.float32 if regression else np.int32),
  )


def uncut_lengths(
  tokens: Tokens, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int
) -> np.ndarray:
  """Number of tokens of each example before `tokenize` cut it, (N,).

  Args:
    tokens: as it made them of the examples, cut to max_length.
  """
  lengths_N = tokens.lengths_N.copy()
  full = np.flatnonzero(lengths_N == max_length)  # Cut, or just as long.
  if len(full):
    long = [examples[i] for i in full.tolist()]
    uncut = tokenize(long, tokenizer, max_length=_NO_LIMIT, token_types=False)
    lengths_N[full] = uncut.lengths_N
  return lengths_N


def _encoded(tokenizer: tokenizers.Tokenizer, texts: Sequence[Any]) -> Sequence[Any]:
  try:
    return tokenizer.encode_batch_fast(texts)
  # The tokenizers library raises bare Exception where its file is incomplete.
  except Exception as error:
    raise LoraxError(f"this tokenizer can't encode the texts: {error}") from error


def _text(number: int, example: Example) -> str | tuple[str, str]:
  text, pair = example.get("text"), example.get("text_pair")
  if not isinstance(text, str) or not isinstance(pair, str | None):
    raise LoraxError(
      f"example {number}: text is a string, and text_pair a string or nothing; "
      f"found {dict(example)!r:.200}"
    )
  with prefixed(f"example {number}"):
    for each in (text, pair or ""):
      check_characters(each)
  return text if pair is None else (text, pair)


def check_characters(text: str) -> None:
  """Raises LoraxError for half of a surrogate pair, which no tokenizer takes."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    half = text[error.start]
    raise LoraxError(
      f"the text holds {half!r}, half of a surrogate pair, which is no character"
    ) from error


def _labels(examples: Sequence[Example], dtype: type) -> np.ndarray | None:
  missing = [n for n, e in enumerate(examples, 1) if e.get("label") is None]
  if len(missing) == len(examples):
    return None
  if missing:
    raise LoraxError(
      f"{len(missing)} examples have no label, the first is {missing[0]}"
    )
  return np.asarray([example["label"] for example in examples], dtype)
