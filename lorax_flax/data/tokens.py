"""A tokenised split: ragged rows in flat arrays, and batches of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorax_flax.errors import LoraxError, unknown

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tokens:
  """N rows of token ids, S ids in all.

  Attributes:
    input_ids_S: int32, the rows one after another.
    offsets: int64 (N + 1,): row i is `[offsets[i]:offsets[i + 1]]`.
    pad_id: what pads `input_ids` in a batch.
    token_type_ids_S: int32, or None where the model uses none.
    attention_mask_S: int32, or None where every id counts.
    labels_N: int32 classes or float32 numbers; None where there are none.
  """

  input_ids_S: np.ndarray
  offsets: np.ndarray
  pad_id: int
  token_type_ids_S: np.ndarray | None = None
  attention_mask_S: np.ndarray | None = None
  labels_N: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def lengths_N(self) -> np.ndarray:
    return np.diff(self.offsets)

  def batch(self, index_B: np.ndarray, length: int) -> Batch:
    """Rows padded on the right to one length.

    Args:
      index_B: row numbers; -1 is a row that isn't there: all padding, weight 0.
      length: T, at least the longest of the rows.

    Returns:
      input_ids, attention_mask, token_type_ids (if any): int32 (B, T); labels (if any):
      int32 or float32 (B,); weights: float32 (B,), 1 for a real row and 0 for one that
      isn't there; index: int32 (B,), as given.
    """
    real = np.flatnonzero(index_B >= 0)
    rows = index_B[real]
    starts, counts = self.offsets[rows], self.lengths_N[rows]
    if len(rows) and counts.max() > length:
      raise LoraxError(f"a row of {counts.max()} tokens doesn't fit length {length}")
    # Every real id's place: its row and column in the batch, and where it is stored.
    column = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    row = np.repeat(real, counts)
    stored = np.repeat(starts, counts) + column

    def padded(values_S: np.ndarray, fill: int) -> np.ndarray:
      out_BxT = np.full((len(index_B), length), fill, np.int32)
      out_BxT[row, column] = values_S[stored]
      return out_BxT

    mask_S = self.attention_mask_S
    if mask_S is None:
      mask_S = np.ones_like(self.input_ids_S)
    batch = {
      "input_ids": padded(self.input_ids_S, self.pad_id),
      "attention_mask": padded(mask_S, 0),
    }
    # A row with nothing to attend to gives a softmax over nothing: let padding rows
    # look at their first token. Their weight is 0 all the same.
    batch["attention_mask"][index_B < 0, 0] = 1
    if self.token_type_ids_S is not None:
      batch["token_type_ids"] = padded(self.token_type_ids_S, 0)
    if self.labels_N is not None:
      labels_B = np.zeros(len(index_B), self.labels_N.dtype)
      labels_B[real] = self.labels_N[rows]
      batch["labels"] = labels_B
    batch["weights"] = (index_B >= 0).astype(np.float32)
    batch["index"] = index_B.astype(np.int32)
    return batch


def ragged(rows: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Rows of ints as (values_S int32, offsets int64 (N + 1,))."""
  offsets = np.zeros(len(rows) + 1, np.int64)
  np.cumsum([len(row) for row in rows], out=offsets[1:])
  values_S = np.zeros(offsets[-1], np.int32)
  for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True):
    values_S[start:stop] = row
  return values_S, offsets


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def from_inputs(
  examples: Sequence[Mapping[str, Sequence[int]]], *, pad_id: int, token_types: bool
) -> Tokens:
  """Model inputs as they are: `{"input_ids": […], "attention_mask": […], …}`.

  Args:
    examples: each has `input_ids`, and may have the other two, of the same length.
    pad_id: what pads them.
    token_types: whether the model uses token types; where an example has none: zeros.

  Raises:
    LoraxError: an unknown name, unequal lengths, an empty row, a value that is no
      integer; it names the example, counted from 1.
  """
  columns: dict[str, list[Sequence[int]]] = {name: [] for name in _INPUTS}
  for number, example in enumerate(examples, 1):
    for name in example:
      if name not in _INPUTS:
        raise LoraxError(f"example {number}: {unknown('model input', name, _INPUTS)}")
      if not isinstance(example[name], list):
        raise LoraxError(f"example {number}: {name} is a list, not {example[name]!r}")
    ids = example.get("input_ids", ())
    if not ids:
      raise LoraxError(f"example {number}: input_ids is missing or empty")
    row = {
      "input_ids": ids,
      "attention_mask": example.get("attention_mask", [1] * len(ids)),
      "token_type_ids": example.get("token_type_ids", [0] * len(ids)),
    }
    for name, values in row.items():
      if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise LoraxError(f"example {number}: {name} holds integers, nothing else")
      if max(map(abs, values)) > np.iinfo(np.int32).max:
        raise LoraxError(f"example {number}: {name} holds integers of 32 bits")
      if len(values) != len(ids):
        raise LoraxError(
          f"example {number}: {name} has {len(values)} values, input_ids {len(ids)}"
        )
      columns[name].append(values)
    if not token_types and any(row["token_type_ids"]):
      raise LoraxError(f"example {number}: this model uses no token_type_ids")
  ids_S, offsets = ragged(columns["input_ids"])
  return Tokens(
    input_ids_S=ids_S,
    offsets=offsets,
    pad_id=pad_id,
    attention_mask_S=ragged(columns["attention_mask"])[0],
    token_type_ids_S=ragged(columns["token_type_ids"])[0] if token_types else None,
  )
