import itertools
import json
from itertools import combinations

import numpy as np
import pytest

from lorax_flax.data import pipeline
from lorax_flax.data.tokens import Tokens
from lorax_flax.errors import LoraxError

BUCKETS = (8, 16, 32)


def _tokens(count, seed=0):
  """Rows of 1 to 32 ids; every id of row i is i."""
  lengths = np.random.default_rng(seed).integers(1, 33, count)
  return Tokens(
    input_ids_S=np.repeat(np.arange(count, dtype=np.int32), lengths),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    pad_id=0,
    labels_N=np.arange(count, dtype=np.int32),
  )


def _train(tokens, shape, seed=0):
  return pipeline.training(tokens, shape, seed=seed)


def _epochs(tokens, shape, count=1, seed=0):
  steps = count * pipeline.steps_per_epoch(len(tokens), shape.batch_size)
  return list(itertools.islice(_train(tokens, shape, seed), steps))


def _rows(batches):
  return [int(i) for batch in batches for i in batch["index"] if i >= 0]


def _same(batch, other):
  assert set(batch) == set(other)
  for name, value in batch.items():
    np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000])
def test_an_epoch_holds_every_example_once_in_steps_per_epoch_full_batches(count):
  batches = _epochs(_tokens(count), pipeline.Shape(32, BUCKETS))
  assert len(batches) == pipeline.steps_per_epoch(count, 32)
  assert sorted(_rows(batches)) == list(range(count))
  for batch in batches:
    assert batch["input_ids"].shape in {(32, length) for length in BUCKETS}
    np.testing.assert_array_equal(batch["weights"], batch["index"] >= 0)
    np.testing.assert_array_equal(batch["labels"], np.maximum(batch["index"], 0))


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
  tokens, shape = _tokens(400), pipeline.Shape(32, BUCKETS)
  steps = pipeline.steps_per_epoch(400, 32)
  batches = _epochs(tokens, shape, 2)
  first, second = _rows(batches[:steps]), _rows(batches[steps:])
  assert sorted(first) == sorted(second) == list(range(400))
  assert first != second
  assert _rows(_epochs(tokens, shape)) == first
  assert _rows(_epochs(tokens, shape, seed=1)) != first


def test_lengths_are_grouped_but_their_order_is_shuffled():
  tokens, shape = _tokens(1600), pipeline.Shape(32, BUCKETS)
  lengths = [batch["input_ids"].shape[1] for batch in _epochs(tokens, shape)]
  # Rows alone would have a mean of 22; ungrouped, all batches have 32.
  assert np.mean(lengths) < 22.8
  assert set(lengths) == set(BUCKETS)
  assert lengths != sorted(lengths)
  assert lengths != sorted(lengths, reverse=True)


def test_one_bucket_is_a_fixed_length():
  for batch in _epochs(_tokens(100), pipeline.Shape(32, (48,))):
    assert batch["input_ids"].shape == (32, 48)


@pytest.mark.parametrize("stop", [0, 1, 12, 13, 14, 38])
def test_a_run_resumed_anywhere_sees_the_very_same_batches(stop):
  tokens, shape = _tokens(400), pipeline.Shape(32, BUCKETS)
  whole = _epochs(tokens, shape, 3, seed=7)
  first = _train(tokens, shape, seed=7)
  for _ in range(stop):
    next(first)
  position = json.loads(json.dumps(first.get_state()))
  again = _train(tokens, shape, seed=7)
  again.set_state(position)
  rest = list(itertools.islice(again, len(whole) - stop))
  assert len(rest) == len(whole) - stop == 39 - stop
  for batch, other in zip(rest, whole[stop:], strict=True):
    _same(batch, other)


def test_there_is_no_end():
  tokens, shape = _tokens(5), pipeline.Shape(2, BUCKETS)
  batches = _train(tokens, shape)
  assert sorted(_rows(next(batches) for _ in range(300))) == sorted([*range(5)] * 100)


@pytest.mark.parametrize("count", [1, 2, 7, 24, 25, 101])
@pytest.mark.parametrize("training", [True, False])
def test_batches_cover_everything_once(count, training):
  tokens, shape = _tokens(count), pipeline.Shape(12, BUCKETS)
  made = _epochs(tokens, shape) if training else pipeline.evaluation(tokens, shape)
  assert len(made) == pipeline.steps_per_epoch(count, 12)
  assert sorted(_rows(made)) == list(range(count))


def test_evaluation_goes_by_length_and_index_restores_the_order():
  tokens = _tokens(101)
  batches = list(pipeline.evaluation(tokens, pipeline.Shape(8, BUCKETS)))
  lengths = [batch["input_ids"].shape[1] for batch in batches]
  assert lengths == sorted(lengths)
  assert set(lengths) == set(BUCKETS)
  restored = np.full(101, -1)
  for batch in batches:
    real = batch["weights"] > 0
    restored[batch["index"][real]] = batch["input_ids"][real, 0]
  assert restored.tolist() == list(range(101))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_chosen_buckets_pad_least_of_all_choices(count):
  lengths = np.random.default_rng(count).geometric(0.08, 300).clip(1, 64)
  top = -(-lengths.max() // 8) * 8

  def padded(buckets):
    return np.asarray(buckets)[np.searchsorted(buckets, lengths)].sum()

  chosen = pipeline.choose_buckets(lengths, count)
  others = [
    (*some, top)
    for size in range(count)
    for some in combinations(range(8, top, 8), size)
  ]
  assert len(chosen) <= count
  assert chosen[-1] == top
  assert padded(chosen) == min(map(padded, others))


def test_buckets_for_lengths_all_alike_are_one():
  assert pipeline.choose_buckets(np.full(9, 16), 3) == (16,)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0, BUCKETS), "batch size is 0"),
    ((8, ()), "ascending"),
    ((8, (16, 8)), "ascending"),
    ((8, (8, 8)), "ascending"),
    ((8, (0, 8)), "ascending"),
  ],
)
def test_a_shape_that_makes_no_sense_is_an_error(arguments, message):
  with pytest.raises(LoraxError, match=message):
    pipeline.Shape(*arguments)


def test_a_row_longer_than_every_bucket_is_an_error_at_once():
  for make in (lambda t, s: pipeline.training(t, s, seed=0), pipeline.evaluation):
    with pytest.raises(LoraxError, match="the longest bucket 16"):
      make(_tokens(50), pipeline.Shape(8, (16,)))


def test_no_examples_is_an_error():
  for make in (lambda t, s: pipeline.training(t, s, seed=0), pipeline.evaluation):
    with pytest.raises(LoraxError, match="no examples"):
      make(_tokens(0), pipeline.Shape(8, BUCKETS))


def test_a_negative_seed_is_an_error():
  with pytest.raises(LoraxError, match="the seed is -1"):
    pipeline.training(_tokens(5), pipeline.Shape(8, BUCKETS), seed=-1)
