import pytest

from lorax_flax.data import tasks
from lorax_flax.errors import LoraxError

GLUE = {"mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"}


def test_the_table_has_the_papers_eight_glue_tasks_and_the_headlines():
  assert {n for n, t in tasks.TASKS.items() if t.source == "glue"} == GLUE
  assert {*tasks.TASKS} == {*GLUE, "headlines"}


@pytest.mark.parametrize("name", sorted(GLUE))
def test_columns_and_classes_are_those_of_tfds(name):
  import tensorflow_datasets.text.glue as tfds_glue

  config = {c.name: c for c in tfds_glue.Glue.BUILDER_CONFIGS}[name]
  task = tasks.get(name)
  assert task.text == tuple(config.text_features)
  assert list(task.labels) == (config.label_classes or [])
  assert task.regression == (name == "stsb")
  assert task.num_labels == {"mnli": 3, "stsb": 1}.get(name, 2)


def test_the_primary_metrics_are_the_papers():
  assert {n: t.primary for n, t in tasks.TASKS.items()} == dict.fromkeys(
    tasks.TASKS, "accuracy"
  ) | {"cola": "matthews_correlation", "stsb": "pearson"}


def test_mnli_has_two_validation_sets():
  assert tasks.get("mnli").evaluation == (
    "validation_matched",
    "validation_mismatched",
  )


def test_an_unknown_task_is_an_error_with_the_nearest_name():
  with pytest.raises(LoraxError, match=r"'sst-2'.*did you mean 'sst2'"):
    tasks.get("sst-2")


def test_a_primary_metric_that_is_not_reported_is_an_error():
  with pytest.raises(LoraxError, match=r"'f2'.*'f1'"):
    tasks.Task("x", ("a",), ("b",), metrics=("f1",), primary="f2")
