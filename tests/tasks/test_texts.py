"""A user's own texts: how files become a task, and what they may not hold."""

import json

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.tasks import task as tasks
from lorax_flax.tasks.texts import TextsSettings
from lorax_flax.train import losses


def _file(folder, rows, name="my.jsonl"):
  file = folder / name
  file.write_text("\n".join(map(json.dumps, rows)))
  return file


def _open(path, **fields):
  return tasks.opened(TextsSettings("texts", path=str(path), **fields))


def _rows(*labels, count=60):
  return [{"text": f"a{i}", "label": labels[i % len(labels)]} for i in range(count)]


@pytest.mark.parametrize(
  ("labels", "names", "problem_type", "metrics", "primary"),
  [
    (("x", "y"), ("x", "y"), None, ("accuracy", "macro_f1"), "accuracy"),
    ((1.5, 2), ("score",), None, ("pearson", "spearman"), "eval_loss"),
    (
      (["x"], ["x", "y"]),
      ("x", "y"),
      "multi_label_classification",
      ("micro_f1", "macro_f1", "exact_match"),
      "micro_f1",
    ),
  ],
)
def test_a_task_follows_from_its_files(
  tmp_path, labels, names, problem_type, metrics, primary
):
  task = _open(_file(tmp_path, _rows(*labels)))
  assert (task.labels, task.num_labels) == (names, len(names))
  assert task.problem_type == problem_type
  objective = task.objective(0.0)
  assert (objective.metrics, objective.primary) == (metrics, primary)
  assert (objective.report is None) == (names == ("score",))


@pytest.mark.parametrize("labels", [(1.5, 2), (["x"], ["y"])])
def test_smoothing_is_for_single_classes(tmp_path, labels):
  task = _open(_file(tmp_path, _rows(*labels)))
  with pytest.raises(LoraxError, match=r"label_smoothing means nothing for texts"):
    task.objective(0.1)


def test_the_files_are_read_once(tmp_path):
  file = _file(tmp_path, _rows("x", "y"))
  task = _open(file)
  file.unlink()
  assert task.objective(0.0).loss is not losses.binary_cross_entropy
  assert task.labels == ("x", "y")


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"text": "", "label": "x"}, "line 61: its text is empty"),
    ({"text": " \n", "label": "x"}, "line 61: its text is empty"),
    ({"text": 3, "label": "x"}, "line 61: its text is no text: 3"),
    ({"text": "a", "text_pair": "", "label": "x"}, "line 61: its text_pair is empty"),
    ({"text": "a", "label": None}, "line 61 has no label"),
    ({"text": "a"}, "line 61 has no label"),
    ({"label": "x"}, "line 61 has no text"),
    ({"text": "a", "label": ["x"]}, "line 61: the label"),
  ],
)
def test_a_row_that_cannot_be_is_named_by_file_and_line(tmp_path, row, message):
  file = _file(tmp_path, [*_rows("x", "y"), row])
  with pytest.raises(LoraxError, match=f"my.jsonl: {message}"):
    _open(file)


def test_a_class_that_validation_alone_has(tmp_path):
  _file(tmp_path, _rows("x", "y"), "train.jsonl")
  _file(tmp_path, _rows("x", "y", "z"), "validation.jsonl")
  with pytest.raises(LoraxError, match=r"validation.jsonl: line 3: no row .* 'z'"):
    _open(tmp_path)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"held_out": 0.0}, "data.held_out is a share"),
    ({"held_out": 1.0}, "data.held_out is a share"),
    ({"labels": "class"}, "unknown data.labels 'class'; did you mean 'classes'"),
    ({"columns": {"label": "y"}}, "unknown column 'y'"),
    ({"columns": {"lable": "y"}}, "did you mean 'label'"),
  ],
)
def test_settings_that_cannot_be(tmp_path, fields, message):
  file = _file(tmp_path, _rows("x", "y"))
  with pytest.raises(LoraxError, match=message):
    _open(file, **fields)


def test_a_path_is_needed():
  with pytest.raises(LoraxError, match=r"data.path: which file"):
    tasks.opened(TextsSettings("texts"))
