import json

import numpy as np
import pytest

from lorax_flax.data import pipeline
from lorax_flax.data.language import encoding
from lorax_flax.data.language.gather import gather
from lorax_flax.data.own import table
from lorax_flax.data.sequences import IGNORED
from lorax_flax.errors import LoraxError


def _read(folder, *lines, max_length=8):
  file = folder / "rows.jsonl"
  texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  file.write_text("".join(text + "\n" for text in texts))
  rows = table.read(file).rows
  made = gather(
    file,
    encoding.token_ids(rows),
    max_length=max_length,
    vocab_size=10,
    pad_id=1,
    skip=False,
  )
  return made.rows, made.lengths_N.tolist()


def test_labels_are_the_ids_that_are_learnt_and_weights_count_them(tmp_path):
  found, lengths = _read(
    tmp_path,
    {"input_ids": [5, 6, 7]},
    {"input_ids": [9, 8, 7, 6], "loss_mask": [1, 0, 0, 1]},
  )
  assert lengths == [3, 4]
  batch = found.batch(np.array([1, -1, 0]), 5)
  i = IGNORED
  expected = {
    "input_ids": [[9, 8, 7, 6, 1], [1, 1, 1, 1, 1], [5, 6, 7, 1, 1]],
    "attention_mask": [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "labels": [[9, i, i, 6, i], [i, i, i, i, i], [5, 6, 7, i, i]],
    # The first token of a row follows from nothing.
    "weights": [1, 0, 2],
    "index": [1, -1, 0],
  }
  assert {name: value.tolist() for name, value in batch.items()} == expected
  assert {n: str(v.dtype) for n, v in batch.items()} == dict.fromkeys(
    batch, "int32"
  ) | {"weights": "float32"}


def test_rows_that_are_too_long_are_cut_and_counted(tmp_path):
  ids = [1, 2, 3, 4, 5]
  found, lengths = _read(
    tmp_path, {"input_ids": ids}, {"input_ids": ids[:3]}, {"input_ids": ids[:4]},
    max_length=3,
  )  # fmt: skip
  assert lengths == [5, 3, 4]
  assert found.lengths_N.tolist() == [3, 3, 3]


def test_every_row_is_seen_once_an_epoch(tmp_path):
  found, _ = _read(tmp_path, *({"input_ids": [n, n + 1] * n} for n in range(2, 5)))
  batches = pipeline.evaluation(found, pipeline.Shape(2, (8,)))
  index = np.concatenate([batch["index"] for batch in batches])
  assert sorted(index) == [-1, 0, 1, 2]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "is not JSON"),
    ([1, 2], "is no object"),
    ({"ids": [1]}, "input_ids is missing or empty"),
    ({"input_ids": []}, "input_ids is missing or empty"),
    ({"input_ids": [1, 10]}, "input_ids has 10, and goes from 0 to 9"),
    ({"input_ids": [1, -1]}, "input_ids has -1"),
    ({"input_ids": [1, 2.5]}, "input_ids holds integers"),
    ({"input_ids": [1, 2**40]}, "input_ids holds integers of 32 bits"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask has 1 values, input_ids 2"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask has 2, .* from 0 to 1"),
    # Nothing is predicted: a single token; a mask; a mask whose ones are cut off.
    ({"input_ids": [1]}, "no token is predicted"),
    ({"input_ids": [1, 2], "loss_mask": [1, 0]}, "no token is predicted"),
    (
      {"input_ids": [1] * 9, "loss_mask": [0] * 8 + [1]},
      "cut off, behind its first 8 tokens",
    ),
  ],
)
def test_a_line_that_can_not_be_is_named(tmp_path, line, message):
  with pytest.raises(LoraxError, match=rf"rows\.jsonl: (line|example) 2:? .*{message}"):
    _read(tmp_path, {"input_ids": [1, 2]}, line)


def test_a_blank_line_is_named_and_those_at_the_end_are_passed_over(tmp_path):
  row = {"input_ids": [1, 2]}
  assert len(_read(tmp_path, row, row, "", "")[0]) == 2
  with pytest.raises(LoraxError, match=r"rows\.jsonl: line 2 is blank"):
    _read(tmp_path, row, "", "", row)
  with pytest.raises(LoraxError, match="is empty but for blank lines"):
    _read(tmp_path, "", " ")


def test_a_byte_order_mark_is_passed_over(tmp_path):
  line = json.dumps({"input_ids": [1, 2]})
  assert len(_read(tmp_path, f"\ufeff{line}", line)[0]) == 2


def test_no_file_and_an_empty_one_are_errors(tmp_path):
  with pytest.raises(LoraxError, match=r"no file .*none\.jsonl"):
    table.read(tmp_path / "none.jsonl")
  with pytest.raises(LoraxError, match="is empty"):
    _read(tmp_path)
