"""Texts, each with the text that a model with a decoder is to write."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from lorax_flax.data.sequences import IGNORED
from lorax_flax.data.tokens import Batch, Column, Tokens


@dataclass(frozen=True)
class Pairs:
  """N rows of two texts.

  Attributes:
    tokens: the texts read, with the decoder's inputs: the targets, shifted right.
    targets_S: int32, the ids to be written, rows as of `tokens.decoder`.
  """

  tokens: Tokens
  targets_S: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def lengths_N(self) -> np.ndarray:
    return self.tokens.lengths_N

  @property
  def targets(self) -> Column:
    """The rows of ids to be written."""
    assert self.tokens.decoder is not None
    return Column(self.targets_S, self.tokens.decoder.offsets)

  def batch(self, index_B: np.ndarray, length: int) -> Batch:
    """Rows padded on the right; arguments and inputs as of `Tokens.batch`.

    Returns:
      Besides the inputs labels: int32 (B, T of the decoder), the id that each position
      is to give, IGNORED in padding; weights: float32 (B,), the number of a row's
      labels, so that a weighted mean is over tokens.
    """
    batch = self.tokens.batch(index_B, length)
    width = batch["decoder_input_ids"].shape[1]
    labels_BxT = self.targets.padded(index_B, width, IGNORED)
    weights_B = (labels_BxT != IGNORED).sum(-1).astype(np.float32)
    return batch | {"labels": labels_BxT, "weights": weights_B}


def pairs(
  tokens: Tokens, targets: Column, start_id: int, lengths: tuple[int, ...]
) -> Pairs:
  """Pairs of texts.

  Args:
    tokens: the texts read.
    targets: the ids to be written, none of them empty.
    start_id: the decoder's first input.
    lengths: padded lengths of the decoder, ascending.
  """
  inputs_S = np.roll(targets.values_S, 1)
  inputs_S[targets.offsets[:-1]] = start_id
  decoder = Column(inputs_S, targets.offsets)
  return Pairs(
    dataclasses.replace(tokens, decoder=decoder, decoder_lengths=lengths),
    targets.values_S,
  )
