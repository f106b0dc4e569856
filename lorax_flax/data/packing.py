"""Packing: several rows in one, so that little of a batch is padding."""

from collections.abc import Sequence

import numpy as np

from lorax_flax.data.sequences import IGNORED, Sequences
from lorax_flax.data.tokens import Tokens


def best_fit(lengths_N: Sequence[int] | np.ndarray, length: int) -> list[list[int]]:
  """The numbers of the rows of each pack, which has room for `length` tokens.

  Best fit, the longest rows first: each goes where it leaves the least room.
  """
  packs: list[list[int]] = []
  # Packs by the room that they have left, and a bit for each room that some have.
  by_room: list[list[int]] = [[] for _ in range(length + 1)]
  some = 0
  for row in np.argsort(-np.asarray(lengths_N), kind="stable").tolist():
    size = int(lengths_N[row])
    if fitting := some >> size:
      room = size + (fitting & -fitting).bit_length() - 1
      pack = by_room[room].pop()
      if not by_room[room]:
        some &= ~(1 << room)
    else:
      room, pack = length, len(packs)
      packs.append([])
    packs[pack].append(row)
    by_room[room - size].append(pack)
    some |= 1 << (room - size)
  return packs


def pack(rows: Sequences, length: int) -> Sequences:
  """Rows in packs of at most `length` tokens.

  A pack's attention mask has the number of each token's row in it, 1, 2, 3, …, and
  positions start anew with each. The first token of a row follows from nothing, and is
  not predicted.
  """
  packs = best_fit(rows.lengths_N, length)
  order_N = np.concatenate([np.asarray(each) for each in packs])
  counts_N = rows.lengths_N[order_N]
  starts_N = np.cumsum(counts_N) - counts_N
  positions_S = np.arange(counts_N.sum()) - np.repeat(starts_N, counts_N)
  source_S = np.repeat(rows.tokens.offsets[order_N], counts_N) + positions_S
  numbers_N = np.concatenate([np.arange(1, len(each) + 1) for each in packs])
  ends = np.cumsum([len(each) for each in packs])
  offsets = np.append(0, np.cumsum(counts_N)[ends - 1])
  tokens = Tokens(
    rows.tokens.input_ids_S[source_S],
    offsets,
    rows.tokens.pad_id,
    attention_mask_S=np.repeat(numbers_N, counts_N).astype(np.int32),
  )
  labels_S = rows.labels_S[source_S]
  labels_S[starts_N] = IGNORED
  return Sequences(tokens, labels_S, positions_S.astype(np.int32))
