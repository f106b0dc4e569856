import numpy as np
import pytest

from lorax_flax.data import tokens
from lorax_flax.errors import LoraxError

ROWS = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}, {"input_ids": [9, 10]}]


def _made(**changes):
  made = tokens.from_inputs(ROWS, pad_id=1, token_types=True)
  return tokens.Tokens(**{**vars(made), **changes})


def test_a_batch_pads_each_row_on_the_right():
  labels = np.array([3, 4, 5], np.int32)
  batch = _made(labels_N=labels).batch(np.array([2, 0, -1]), 4)
  expected = {
    "input_ids": [[9, 10, 1, 1], [5, 6, 7, 1], [1, 1, 1, 1]],
    "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]],
    "token_type_ids": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "labels": [5, 3, 0],
    "weights": [1, 1, 0],
    "index": [2, 0, -1],
  }
  assert {name: value.tolist() for name, value in batch.items()} == expected
  assert {n: str(v.dtype) for n, v in batch.items()} == dict.fromkeys(
    batch, "int32"
  ) | {"weights": "float32"}


def test_regression_labels_stay_float32():
  batch = _made(labels_N=np.array([1.5, 2, 3], np.float32)).batch(np.array([0]), 3)
  assert batch["labels"].dtype == np.float32
  assert batch["labels"].tolist() == [1.5]


def test_what_a_split_has_not_a_batch_has_not():
  made = tokens.from_inputs(ROWS, pad_id=1, token_types=False)
  assert set(made.batch(np.array([0]), 3)) == {
    "input_ids",
    "attention_mask",
    "weights",
    "index",
  }


def test_a_batch_shorter_than_a_row_is_an_error():
  with pytest.raises(LoraxError, match="3 tokens doesn't fit length 2"):
    _made().batch(np.array([1, 0]), 2)


def test_inputs_as_they_are_keep_their_mask_and_types():
  row = {"input_ids": [4, 5], "attention_mask": [1, 0], "token_type_ids": [0, 1]}
  batch = tokens.from_inputs([row], pad_id=0, token_types=True).batch(np.array([0]), 3)
  assert batch["attention_mask"].tolist() == [[1, 0, 0]]
  assert batch["token_type_ids"].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"input_id": [1]}, "did you mean 'input_ids'"),
    ({}, "missing or empty"),
    ({"input_ids": []}, "missing or empty"),
    ({"input_ids": [1, 2], "attention_mask": [1]}, "has 1 values, input_ids 2"),
    ({"input_ids": [1, 2.5]}, "holds integers"),
    ({"input_ids": [1, True]}, "holds integers"),
    ({"input_ids": "ab"}, "a list"),
    ({"input_ids": 3}, "a list"),
    ({"input_ids": [1], "token_type_ids": None}, "a list"),
    ({"input_ids": [2**40]}, "32 bits"),
    ({"input_ids": [1], "token_type_ids": [1]}, "uses no token_type_ids"),
  ],
)
def test_malformed_inputs_are_an_error_with_the_examples_number(row, message):
  with pytest.raises(LoraxError, match=f"example 2: .*{message}"):
    tokens.from_inputs([ROWS[0], row], pad_id=0, token_types=False)
