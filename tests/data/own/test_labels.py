"""Labels of a user's rows: their kind, their order, and what is refused."""

import json

import numpy as np
import pytest

from lorax_flax.data.own import labels, table
from lorax_flax.errors import LoraxError


def _table(folder, split, values):
  file = folder / f"{split}.jsonl"
  rows = [{"text": "a", "label": value} for value in values]
  file.write_text("\n".join(map(json.dumps, rows)))
  return table.read(file)


def _find(folder, train, held_out=(), kind=None):
  tables = {"train": _table(folder, "train", train)}
  if held_out:
    tables["validation"] = _table(folder, "validation", held_out)
  return labels.find(tables, kind)


@pytest.mark.parametrize(
  ("values", "names", "found"),
  [
    (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
    ([10, 2, 10], ("2", "10"), [1, 0, 1]),
    (["10", " 2"], ("2", "10"), [1, 0]),
    ([-1, 1], ("-1", "1"), [0, 1]),
    ([True, False], ("false", "true"), [1, 0]),
    (["10", "2", "x"], ("10", "2", "x"), [0, 1, 2]),
    ([1.0, 0.0], ("0", "1"), [1, 0]),
  ],
)
def test_names_and_integers_are_classes_in_their_order(tmp_path, values, names, found):
  mixed = "x" in values or isinstance(values[0], float)
  own = _find(tmp_path, values, kind="classes" if mixed else None)
  assert (own.kind, own.names) == ("classes", names)
  assert own.values["train"].dtype == np.int32
  assert own.values["train"].tolist() == found
  assert sum(own.counts("train").values()) == len(values)


@pytest.mark.parametrize(
  ("values", "kind"), [([0.5, 2], None), (["0.5", "2"], None), ([1, 2], "number")]
)
def test_numbers_are_regressed(tmp_path, values, kind):
  own = _find(tmp_path, values, kind=kind)
  assert (own.kind, own.names) == ("number", ("score",))
  assert own.values["train"].tolist() == list(map(float, values))


@pytest.mark.parametrize(
  ("values", "kind"),
  [([["b", "a"], [], ["b"]], None), (["b, a", "", "b"], "several")],
)
def test_lists_are_several_classes_at_once(tmp_path, values, kind):
  own = _find(tmp_path, values, kind=kind)
  assert (own.kind, own.names) == ("several", ("a", "b"))
  assert own.values["train"].tolist() == [[1, 1], [0, 0], [0, 1]]
  assert own.counts("train") == {"a": 1, "b": 2}


@pytest.mark.parametrize(
  ("train", "held_out", "kind", "message"),
  [
    (
      ["a", "b"],
      ["a", "bb"],
      None,
      "validation.jsonl: line 2: no row .*'bb'.*mean 'b'",
    ),
    (["a", "a"], [], None, "train.jsonl: .* two classes, .* the class 'a' alone"),
    (["a", "b", 3], [], None, "train.jsonl: line 3: the label 3 is an integer, and 2 "),
    (["1", "2", "x"], [], None, "line 3: the label 'x' is a name.*labels=classes"),
    ([1, 2], ["x"], None, "validation.jsonl: line 1: the label 'x' is a name"),
    ([["a"], "b", "b"], [], None, r"line 1: the label \['a'\] is a list, and 2 other"),
    ([0.5, "nan"], [], None, "line 2: the label 'nan' is no finite number"),
    (["x", "y"], [], "number", "line 1: the label 'x' is no number"),
    ([True, False], [], "number", "line 1: the label True is no number"),
    ([1e39, 1], [], None, r"line 1: the label 1e\+39 is no finite number"),
    (["a", " "], [], None, "line 2 has no label: it is empty"),
    ([{"a": 1}, "b"], [], None, "line 1: the label {'a': 1} is no name, number"),
    ([["a", ["b"]], ["c"]], [], None, "line 1: .* is no class"),
    ([1, 2], [], "several", "line 1: the label 1 is no list of names"),
    ([["a"], []], [], None, "two classes, .* the class 'a' alone"),
    ([[], []], [], None, "two classes, and the rows to train on have none"),
  ],
)
def test_what_is_no_label_is_named_by_file_and_line(
  tmp_path, train, held_out, kind, message
):
  with pytest.raises(LoraxError, match=message):
    _find(tmp_path, train, held_out, kind)
