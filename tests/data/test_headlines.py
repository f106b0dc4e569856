import random

import pytest

from lorax_flax.data import headlines
from lorax_flax.errors import LoraxError


@pytest.fixture(scope="module")
def splits(headlines_file):
  return headlines.split(headlines._read(headlines_file))


def _texts(examples):
  return [example["text"] for example in examples]


def test_eight_thousand_train_and_three_thousand_are_held_out(splits):
  assert len(splits.train) == 8000
  assert len(splits.evaluation["validation"]) == 3000
  share = sum(example["label"] for example in splits.train) / 8000
  assert 0.45 < share < 0.5


def test_no_headline_is_in_both_splits_or_in_one_twice(splits):
  train, held_out = _texts(splits.train), _texts(splits.evaluation["validation"])
  keys = [" ".join(text.lower().split()) for text in (*train, *held_out)]
  assert len(set(keys)) == 11_000


def test_labels_are_those_of_the_file(splits, headlines_file):
  labels = {
    " ".join(e["text"].split()): e["label"] for e in headlines._read(headlines_file)
  }
  assert all(labels[e["text"]] == e["label"] for e in splits.train)


def test_the_split_is_fixed(splits):
  assert splits.train[0]["text"] == "disgruntled bolton shoots 17 un delegates, self"


def test_neither_order_nor_repetition_changes_the_split(splits, headlines_file):
  examples = list(headlines._read(headlines_file))
  examples += [{**e, "text": f" {e['text'].upper()}  "} for e in examples[::3]]
  plain = headlines.split(examples)
  random.Random(0).shuffle(examples)
  assert headlines.split(examples) == plain
  assert [t.lower() for t in _texts(plain.train)] == [
    t.lower() for t in _texts(splits.train)
  ]


def test_too_few_headlines_is_an_error():
  with pytest.raises(LoraxError, match="1 different headlines"):
    headlines.split([{"text": "a", "label": 1}, {"text": "A ", "label": 1}])


@pytest.mark.parametrize(
  "line", ["{", "[]", '{"input": [], "ideal": "1"}', '{"ideal": "2"}']
)
def test_a_line_of_another_form_is_an_error_with_its_number(tmp_path, line):
  file = tmp_path / "samples.jsonl"
  file.write_text('{"input": [0, {"content": "a"}], "ideal": "1"}\n' + line + "\n")
  with pytest.raises(LoraxError, match=r"samples\.jsonl:2: not a labelled headline"):
    list(headlines._read(file))
