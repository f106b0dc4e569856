import numpy as np
import pytest

from lorax_flax.data import packing, pipeline
from lorax_flax.data.sequences import IGNORED, Sequences
from lorax_flax.data.tokens import Tokens, ragged


def _rows(*lengths):
  """Rows whose ids say row and column: 100 · row + column."""
  ids = [100 * row + np.arange(n) for row, n in enumerate(lengths, 1)]
  ids_S, offsets = ragged(ids)
  return Sequences(Tokens(ids_S, offsets, pad_id=9), ids_S.copy())


def test_each_row_goes_where_it_leaves_the_least_room():
  # First fit would put the 3 into the first pack, and the 4 into a fourth one.
  assert packing.best_fit([5, 7, 3, 4, 6], 10) == [[1, 2], [4, 3], [0]]


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_in_one_pack_and_none_is_overfull(seed):
  lengths = np.random.default_rng(seed).integers(1, 33, 500)
  packs = packing.best_fit(lengths, 64)
  assert sorted(row for pack in packs for row in pack) == list(range(500))
  assert max(lengths[pack].sum() for pack in packs) <= 64
  assert len(packs) <= 1.02 * lengths.sum() / 64 + 1


def test_a_batch_of_packs():
  packs = packing.pack(_rows(3, 2, 4), 6)
  assert packs.lengths_N.tolist() == [6, 3]
  batch = packs.batch(np.array([1, 0, -1]), 8)
  i = IGNORED
  expected = {
    "input_ids": [
      [100, 101, 102, 9, 9, 9, 9, 9],
      [300, 301, 302, 303, 200, 201, 9, 9],
      [9] * 8,
    ],
    "attention_mask": [
      [1, 1, 1, 0, 0, 0, 0, 0],
      [1, 1, 1, 1, 2, 2, 0, 0],
      [1, 0, 0, 0, 0, 0, 0, 0],
    ],
    "position_ids": [[0, 1, 2, 0, 0, 0, 0, 0], [0, 1, 2, 3, 0, 1, 0, 0], [0] * 8],
    # A row's first token does not follow from the row before it.
    "labels": [[i, 101, 102, i, i, i, i, i], [i, 301, 302, 303, i, 201, i, i], [i] * 8],
    "weights": [2, 4, 0],
    "index": [1, 0, -1],
  }
  assert {name: value.tolist() for name, value in batch.items()} == expected


def test_the_order_of_packs_is_resumable():
  packs = packing.pack(_rows(*range(2, 12)), 12)
  shape = pipeline.Shape(2, (12,))
  batches = pipeline.training(packs, shape, seed=3)
  next(batches)
  place = batches.get_state()
  ahead = [next(batches) for _ in range(5)]
  batches.set_state(place)
  for batch in ahead:
    again = next(batches)
    for name, value in batch.items():
      np.testing.assert_array_equal(again[name], value)


def test_the_share_of_padding():
  assert pipeline.padding_share(np.array([3, 8, 9]), (8, 16)) == 1 - 20 / 32
