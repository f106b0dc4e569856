"""Token ids for next-token prediction: rows of JSON lines, and batches of them.

A line is `{"input_ids": […]}`, and may have a `"loss_mask"` of the same length: 1 where
a token is a target, 0 where it is only context, as in a prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_flax.data.tokens import Batch, Column, Tokens, integers, ragged
from lorax_flax.errors import LoraxError, prefixed, unknown
from lorax_flax.files import strict_json

# The label of padding and of prompts, which are not predicted; as in transformers.
IGNORED = -100

_IDS, _MASK = "input_ids", "loss_mask"


@dataclass(frozen=True)
class Sequences:
  """N rows of token ids, S ids in all.

  Attributes:
    tokens: the rows.
    labels_S: int32, the id where it is to be predicted, else IGNORED. The first of a
      row is never predicted.
  """

  tokens: Tokens
  labels_S: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def lengths_N(self) -> np.ndarray:
    return self.tokens.lengths_N

  def batch(self, index_B: np.ndarray, length: int) -> Batch:
    """Rows padded on the right to one length; arguments as of `Tokens.batch`.

    Returns:
      input_ids, attention_mask, labels: int32 (B, T); weights: float32 (B,), the number
      of tokens of the row that are predicted, so that a weighted mean is over tokens;
      index: int32 (B,), as given.
    """
    batch = self.tokens.batch(index_B, length)
    column = Column(self.labels_S, self.tokens.offsets)
    labels_BxT = column.padded(index_B, length, IGNORED)
    predicted_B = (labels_BxT[:, 1:] != IGNORED).sum(-1)
    return batch | {"labels": labels_BxT, "weights": predicted_B.astype(np.float32)}


class Cut(NamedTuple):
  """The number of rows that were truncated, and of tokens that were cut off."""

  rows: int
  tokens: int


def read(
  file: Path, *, max_length: int, vocab_size: int, pad_id: int
) -> tuple[Sequences, Cut]:
  """Reads a file of JSON lines.

  Args:
    max_length: longer rows are truncated, at their end.
    vocab_size: upper bound of ids, exclusive.
    pad_id: the id of padding.

  Raises:
    LoraxError: no such file, an empty one, or a line that is malformed or has no
      token to predict; it names the line.
  """
  ids: list[np.ndarray] = []
  labels: list[np.ndarray] = []
  rows = tokens = 0
  for number, line in strict_json.lines(file):
    with prefixed(f"{file}"):
      ids_T, labels_T = _row(line, number, vocab_size)
      if len(ids_T) > max_length:
        rows, tokens = rows + 1, tokens + len(ids_T) - max_length
        ids_T, labels_T = ids_T[:max_length], labels_T[:max_length]
      if not (labels_T[1:] != IGNORED).any():
        raise LoraxError(
          f"example {number}: no token is predicted: of its first {len(ids_T)} tokens "
          f"but the first, {_MASK} marks none"
        )
    ids.append(ids_T)
    labels.append(labels_T)
  ids_S, offsets = ragged(ids)
  found = Sequences(Tokens(ids_S, offsets, pad_id), ragged(labels)[0])
  return found, Cut(rows, tokens)


def blank(length: int) -> Sequences:
  """One row of `length` tokens, for its shapes."""
  zeros_S = np.zeros(length, np.int32)
  offsets = np.array([0, length], np.int64)
  return Sequences(Tokens(zeros_S, offsets, pad_id=0), zeros_S)


def _row(
  line: Mapping[str, Any], number: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """The ids and the labels of a line."""
  for name in line:
    if name not in (_IDS, _MASK):
      raise LoraxError(f"example {number}: {unknown('name', name, (_IDS, _MASK))}")
  ids_T = np.array(integers(line, _IDS, number), np.int32)
  _check(_IDS, ids_T, vocab_size, number)
  if _MASK not in line:
    return ids_T, ids_T
  mask_T = np.array(integers(line, _MASK, number), np.int32)
  _check(_MASK, mask_T, 2, number)
  if len(mask_T) != len(ids_T):
    raise LoraxError(
      f"example {number}: {_MASK} has {len(mask_T)} values, {_IDS} {len(ids_T)}"
    )
  return ids_T, np.where(mask_T == 1, ids_T, np.int32(IGNORED))


def _check(name: str, values_T: np.ndarray, end: int, number: int) -> None:
  # JAX would clamp an index that is out of bounds.
  wrong = values_T[(values_T < 0) | (values_T >= end)]
  if len(wrong):
    raise LoraxError(
      f"example {number}: {name} has {wrong[0]}, and goes from 0 to {end - 1}"
    )
