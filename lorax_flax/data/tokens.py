"""A tokenised split: ragged rows in flat arrays, and batches of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_flax.errors import LoraxError, prefixed, unknown

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Column:
  """N rows of integers, S in all.

  Attributes:
    values_S: int32, the rows one after another.
    offsets: int64 (N + 1,): row i is `[offsets[i]:offsets[i + 1]]`.
  """

  values_S: np.ndarray
  offsets: np.ndarray

  @property
  def lengths_N(self) -> np.ndarray:
    return np.diff(self.offsets)

  def padded(self, index_B: np.ndarray, length: int, fill: int) -> np.ndarray:
    """Rows padded on the right: int32 (B, length). A row -1 is `fill` throughout."""
    real = np.flatnonzero(index_B >= 0)
    rows = index_B[real]
    starts, counts = self.offsets[rows], self.lengths_N[rows]
    if len(rows) and counts.max() > length:
      raise LoraxError(f"a row of {counts.max()} tokens doesn't fit length {length}")
    # For every id: its row and column in the batch, and its index in the values.
    column = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    out_BxT = np.full((len(index_B), length), fill, np.int32)
    out_BxT[np.repeat(real, counts), column] = self.values_S[
      np.repeat(starts, counts) + column
    ]
    return out_BxT

  def part(self, start: int, stop: int) -> "Column":
    """The rows from `start` to `stop`, without a copy of their values."""
    offsets = self.offsets[start : stop + 1]
    return Column(self.values_S[offsets[0] : offsets[-1]], offsets - offsets[0])


@dataclass(frozen=True)
class Tokens:
  """N rows of token ids, S ids in all.

  Attributes:
    input_ids_S: int32, the rows one after another.
    offsets: int64 (N + 1,): row i is `[offsets[i]:offsets[i + 1]]`.
    pad_id: the id of padding in `input_ids`.
    token_type_ids_S: int32, or None where the model has no types.
    attention_mask_S: int32, or None for ones.
    labels_N: int32 classes or float32 numbers; float32 (N, C), 1 for each class that a
      row has, where these are several; None where there are none.
    decoder: the decoder's rows, where a model has one.
    decoder_lengths: padded lengths of these, ascending; a batch takes the smallest
      that holds its rows.
  """

  input_ids_S: np.ndarray
  offsets: np.ndarray
  pad_id: int
  token_type_ids_S: np.ndarray | None = None
  attention_mask_S: np.ndarray | None = None
  labels_N: np.ndarray | None = None
  decoder: Column | None = None
  decoder_lengths: tuple[int, ...] = ()

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def lengths_N(self) -> np.ndarray:
    return np.diff(self.offsets)

  def decoder_buckets(self, rows: np.ndarray | slice) -> np.ndarray:
    """Numbers of the decoder lengths that hold these rows."""
    assert self.decoder is not None
    return np.searchsorted(self.decoder_lengths, self.decoder.lengths_N[rows])

  def batch(self, index_B: np.ndarray, length: int) -> Batch:
    """Rows padded on the right to one length.

    Args:
      index_B: row numbers; -1 is a padding row, with weight 0.
      length: T, at least the longest of the rows.

    Returns:
      input_ids, attention_mask, token_type_ids (if any): int32 (B, T);
      decoder_input_ids (if any): int32 (B, one of decoder_lengths); labels (if any):
      int32 or float32 (B,), or float32 (B, C); weights: float32 (B,), 1 for a real row
      and 0 for padding; index: int32 (B,), as given.
    """
    padded = lambda values_S, fill: Column(values_S, self.offsets).padded(
      index_B, length, fill
    )
    mask_S = self.attention_mask_S
    if mask_S is None:
      mask_S = np.ones_like(self.input_ids_S)
    batch = {
      "input_ids": padded(self.input_ids_S, self.pad_id),
      "attention_mask": padded(mask_S, 0),
    }
    # Padding rows attend to their first token, since a softmax over no token is NaN.
    batch["attention_mask"][index_B < 0, 0] = 1
    if self.token_type_ids_S is not None:
      batch["token_type_ids"] = padded(self.token_type_ids_S, 0)
    if self.decoder is not None:
      # The decoder is causal, so that padding behind a row needs no mask.
      number = self.decoder_buckets(index_B[index_B >= 0]).max(initial=0)
      batch[DECODER_INPUT] = self.decoder.padded(
        index_B, self.decoder_lengths[number], self.pad_id
      )
    real = index_B >= 0
    if self.labels_N is not None:
      shape = (len(index_B), *self.labels_N.shape[1:])
      labels_B = np.zeros(shape, self.labels_N.dtype)
      labels_B[real] = self.labels_N[index_B[real]]
      batch["labels"] = labels_B
    return batch | marks(index_B)

  def part(self, start: int, stop: int) -> "Tokens":
    """The rows from `start` to `stop`."""
    offsets = self.offsets[start : stop + 1]
    cut = lambda x, first, last: None if x is None else x[first:last]
    return dataclasses.replace(
      self,
      input_ids_S=self.input_ids_S[offsets[0] : offsets[-1]],
      offsets=offsets - offsets[0],
      token_type_ids_S=cut(self.token_type_ids_S, offsets[0], offsets[-1]),
      attention_mask_S=cut(self.attention_mask_S, offsets[0], offsets[-1]),
      labels_N=cut(self.labels_N, start, stop),
      decoder=self.decoder and self.decoder.part(start, stop),
    )


def marks(index_B: np.ndarray) -> Batch:
  """The weights and the index of a batch's rows."""
  return {
    "weights": (index_B >= 0).astype(np.float32),
    "index": index_B.astype(np.int32),
  }


def ragged(rows: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Rows of ints as (values_S int32, offsets int64 (N + 1,))."""
  offsets = np.zeros(len(rows) + 1, np.int64)
  np.cumsum([len(row) for row in rows], out=offsets[1:])
  values_S = np.zeros(offsets[-1], np.int32)
  for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True):
    values_S[start:stop] = row
  return values_S, offsets


def check_ids(rows: Tokens, vocab_size: int, token_types: int) -> None:
  """Checks that every id has a row in its table: JAX would clamp it, or give NaN.

  Args:
    vocab_size: number of rows of the token embeddings.
    token_types: number of token types.

  Raises:
    LoraxError: one that has none; it counts rows as examples, from 1.
  """
  columns = {
    "input_ids": (rows.input_ids_S, rows.offsets, vocab_size),
    "attention_mask": (rows.attention_mask_S, rows.offsets, 2),
    "token_type_ids": (rows.token_type_ids_S, rows.offsets, token_types),
  }
  if rows.decoder is not None:
    columns[DECODER_INPUT] = (rows.decoder.values_S, rows.decoder.offsets, vocab_size)
  for name, (ids_S, offsets, end) in columns.items():
    if ids_S is None:
      continue
    wrong = np.flatnonzero((ids_S < 0) | (ids_S >= end))
    if len(wrong):
      row = int(np.searchsorted(offsets, wrong[0], side="right"))
      raise LoraxError(
        f"example {row}: {name} has {ids_S[wrong[0]]}, and goes from 0 to {end - 1}"
      )


TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
DECODER_INPUT = "decoder_input_ids"
_MULTIPLE = 8  # of the decoder's padded length, for vector units


def from_inputs(
  examples: Sequence[Mapping[str, Sequence[int]]],
  *,
  pad_id: int,
  token_types: bool,
  decoder: bool = False,
) -> Tokens:
  """Rows of model inputs: `{"input_ids": […], "attention_mask": […], …}`.

  Args:
    examples: each has `input_ids`, and may have the other two, of the same length.
    pad_id: the id of padding.
    token_types: whether the model has token types; zeros where an example has none.
    decoder: whether each has `decoder_input_ids` too, of a length of their own.

  Raises:
    LoraxError: an unknown name, unequal lengths, an empty row, a value that is not an
      integer; it names the example, counted from 1.
  """
  names = (*TEXT_INPUTS, DECODER_INPUT) if decoder else TEXT_INPUTS
  columns: dict[str, list[Sequence[int]]] = {name: [] for name in TEXT_INPUTS}
  for number, example in enumerate(examples, 1):
    for name in example:
      if name not in names:
        raise LoraxError(f"example {number}: {unknown('model input', name, names)}")
    ids = _integers(example, "input_ids", number)
    row = {
      "attention_mask": [1] * len(ids),
      "token_type_ids": [0] * len(ids),
      **{
        name: _integers(example, name, number)
        for name in TEXT_INPUTS
        if name in example
      },
    }
    for name, values in row.items():
      if len(values) != len(ids):
        raise LoraxError(
          f"example {number}: {name} has {len(values)} values, input_ids {len(ids)}"
        )
      columns[name].append(values)
    if not token_types and any(row["token_type_ids"]):
      raise LoraxError(f"example {number}: this model uses no token_type_ids")
  ids_S, offsets = ragged(columns["input_ids"])
  tokens = Tokens(
    input_ids_S=ids_S,
    offsets=offsets,
    pad_id=pad_id,
    attention_mask_S=ragged(columns["attention_mask"])[0],
    token_type_ids_S=ragged(columns["token_type_ids"])[0] if token_types else None,
  )
  return with_decoder(tokens, examples) if decoder else tokens


def with_decoder(tokens: Tokens, examples: Sequence[Mapping[str, Any]]) -> Tokens:
  """The rows with `decoder_input_ids` of examples, one a row; errors as above."""
  rows = [_integers(each, DECODER_INPUT, i) for i, each in enumerate(examples, 1)]
  column = Column(*ragged(rows))
  longest = -(-int(column.lengths_N.max()) // _MULTIPLE) * _MULTIPLE
  return dataclasses.replace(tokens, decoder=column, decoder_lengths=(longest,))


def integers(example: Mapping[str, Any], name: str) -> Sequence[int]:
  """A row of ids of one example; LoraxError where it is none."""
  values = example.get(name, [])
  if not isinstance(values, list):
    raise LoraxError(f"{name} is a list, not {values!r:.80}")
  if not values:
    raise LoraxError(f"{name} is missing or empty")
  if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
    raise LoraxError(f"{name} holds integers, nothing else")
  if max(map(abs, values)) > np.iinfo(np.int32).max:
    raise LoraxError(f"{name} holds integers of 32 bits")
  return values


def _integers(example: Mapping[str, Any], name: str, number: int) -> Sequence[int]:
  """`integers` of an example that is counted from 1."""
  with prefixed(f"example {number}"):
    return integers(example, name)
