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


def _train(tokens, shape, **changes):
  return pipeline.training(tokens, shape, **{"seed": 0, "epochs": 1, **changes})


def _rows(batches):
  return [int(i) for batch in batches for i in batch["index"] if i >= 0]


def _same(batch, other):
  assert set(batch) == set(other)
  for name, value in batch.items():
    np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000])
def test_an_epoch_holds_every_example_once_in_steps_per_epoch_full_batches(count):
  batches = list(_train(_tokens(count), pipeline.Shape(32, BUCKETS)))
  assert len(batches) == pipeline.steps_per_epoch(count, 32)
  assert sorted(_rows(batches)) == list(range(count))
  for batch in batches:
    assert batch["input_ids"].shape in {(32, length) for length in BUCKETS}
    np.testing.assert_array_equal(batch["weights"], batch["index"] >= 0)
    np.testing.assert_array_equal(batch["labels"], np.maximum(batch["index"], 0))


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
  tokens, shape = _tokens(400), pipeline.Shape(32, BUCKETS)
  steps = pipeline.steps_per_epoch(400, 32)
  batches = list(_train(tokens, shape, epochs=2))
  first, second = _rows(batches[:steps]), _rows(batches[steps:])
  assert sorted(first) == sorted(second) == list(range(400))
  assert first != second
  assert _rows(_train(tokens, shape)) == first
  assert _rows(_train(tokens, shape, seed=1)) != first


def test_lengths_are_grouped_but_their_order_is_shuffled():
  tokens, shape = _tokens(1600), pipeline.Shape(32, BUCKETS)
  lengths = [batch["input_ids"].shape[1] for batch in _train(tokens, shape)]
  # Rows alone would have a mean of 22; ungrouped, all batches have 32.
  assert np.mean(lengths) < 22.8
  assert set(lengths) == set(BUCKETS)
  assert lengths != sorted(lengths)
  assert lengths != sorted(lengths, reverse=True)


def test_one_bucket_is_a_fixed_length():
  for batch in _train(_tokens(100), pipeline.Shape(32, (48,))):
    assert batch["input_ids"].shape == (32, 48)


@pytest.mark.parametrize("stop", [0, 1, 12, 13, 14, 38])
def test_a_run_resumed_anywhere_sees_the_very_same_batches(stop):
  tokens, shape = _tokens(400), pipeline.Shape(32, BUCKETS)
  whole = list(_train(tokens, shape, seed=7, epochs=3))
  first = _train(tokens, shape, seed=7, epochs=3)
  for _ in range(stop):
    next(first)
  position = json.loads(json.dumps(first.get_state()))
  again = _train(tokens, shape, seed=7, epochs=3)
  again.set_state(position)
  rest = list(again)
  assert len(rest) == len(whole) - stop == 39 - stop
  for batch, other in zip(rest, whole[stop:], strict=True):
    _same(batch, other)


def test_a_position_taken_by_one_process_count_serves_another():
  tokens = _tokens(400)
  one = _train(tokens, pipeline.Shape(32, BUCKETS), epochs=2)
  for _ in range(15):
    next(one)
  two = [
    _train(tokens, pipeline.Shape(32, BUCKETS, index, 2), epochs=2) for index in (0, 1)
  ]
  for part in two:
    part.set_state(one.get_state())
  parts = [next(part) for part in two]
  _same(next(one), {n: np.concatenate([p[n] for p in parts]) for n in parts[0]})


def test_without_epochs_there_is_no_end():
  tokens, shape = _tokens(5), pipeline.Shape(2, BUCKETS)
  batches = _train(tokens, shape, epochs=None)
  assert sorted(_rows(next(batches) for _ in range(300))) == sorted([*range(5)] * 100)


@pytest.mark.parametrize("count", [1, 2, 7, 24, 25, 101])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("training", [True, False])
def test_processes_share_every_batch_and_cover_everything_once(
  count, processes, training
):
  tokens = _tokens(count)
  parts = []
  for index in range(processes):
    shape = pipeline.Shape(12, BUCKETS, index, processes)
    made = _train(tokens, shape) if training else pipeline.evaluation(tokens, shape)
    parts.append(list(made))
  assert {len(part) for part in parts} == {pipeline.steps_per_epoch(count, 12)}
  assert sorted(row for part in parts for row in _rows(part)) == list(range(count))
  whole = _train(tokens, pipeline.Shape(12, BUCKETS))
  if not training:
    whole = pipeline.evaluation(tokens, pipeline.Shape(12, BUCKETS))
  for batch, *shares in zip(whole, *parts, strict=True):
    _same(batch, {n: np.concatenate([share[n] for share in shares]) for n in batch})


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
    ((9, BUCKETS, 0, 2), "can't be shared by 2 processes"),
    ((8, BUCKETS, 2, 2), "process 2 of 2"),
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
