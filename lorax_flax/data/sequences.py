"""Token ids for next-token prediction, and batches of them."""

from dataclasses import dataclass

import numpy as np

from lorax_flax.data.tokens import Batch, Column, Tokens

# The label of padding and of prompts, which are not predicted; as in transformers.
IGNORED = -100


@dataclass(frozen=True)
class Sequences:
  """N rows of token ids, S ids in all.

  Attributes:
    tokens: the rows.
    labels_S: int32, the id where it is to be predicted, else IGNORED. The first of a
      row is never predicted.
    positions_S: int32, of the tokens of packs; None counts from a row's start.
  """

  tokens: Tokens
  labels_S: np.ndarray
  positions_S: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def lengths_N(self) -> np.ndarray:
    return self.tokens.lengths_N

  def batch(self, index_B: np.ndarray, length: int) -> Batch:
    """Rows padded on the right to one length; arguments as of `Tokens.batch`.

    Returns:
      input_ids, attention_mask, labels, and of packs position_ids: int32 (B, T), the
      mask of packs as `packing.pack` has it; weights: float32 (B,), the number
      of tokens of the row that are predicted, so that a weighted mean is over tokens;
      index: int32 (B,), as given.
    """
    batch = self.tokens.batch(index_B, length)
    offsets = self.tokens.offsets
    if self.positions_S is not None:
      positions = Column(self.positions_S, offsets)
      batch["position_ids"] = positions.padded(index_B, length, 0)
    labels_BxT = Column(self.labels_S, offsets).padded(index_B, length, IGNORED)
    predicted_B = (labels_BxT[:, 1:] != IGNORED).sum(-1)
    return batch | {"labels": labels_BxT, "weights": predicted_B.astype(np.float32)}


def blank(length: int) -> Sequences:
  """One row of `length` tokens, for its shapes."""
  zeros_S = np.zeros(length, np.int32)
  offsets = np.array([0, length], np.int64)
  return Sequences(Tokens(zeros_S, offsets, pad_id=0), zeros_S)
