import jax.numpy as jnp
import numpy as np
import pytest

from lorax_flax.data import tasks
from lorax_flax.errors import LoraxError
from lorax_flax.train import metrics
from lorax_flax.train.metrics import Mean


def _logits(predicted):
  return np.eye(2, dtype=np.float32)[np.asarray(predicted)]


def test_glue_metrics_by_hand():
  logits, labels = _logits([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
  found = metrics.compute(["accuracy", "f1", "matthews_correlation"], logits, labels)
  # Two true positives, one false, one missed, one true negative.
  assert found["accuracy"] == pytest.approx(3 / 5)
  assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
  assert found["matthews_correlation"] == pytest.approx(
    (2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2)
  )


def test_regression_metrics_take_the_one_output_as_it_is():
  logits = np.array([[0.1], [0.4], [0.3], [9.0]], np.float32)
  labels = np.array([0.0, 2.0, 1.0, 3.0], np.float32)
  found = metrics.compute(["pearson", "spearman"], logits, labels)
  assert found["spearman"] == pytest.approx(1.0)
  assert found["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], labels)[0, 1])


def test_constant_predictions_correlate_with_nothing():
  logits, labels = np.ones((4, 1), np.float32), np.arange(4.0)
  assert metrics.compute(["pearson", "spearman"], logits, labels) == {
    "pearson": 0.0,
    "spearman": 0.0,
  }
  assert metrics.compute(
    ["matthews_correlation", "f1"], _logits([0, 0]), np.array([0, 1])
  ) == {"matthews_correlation": 0.0, "f1": 0.0}


def test_every_tasks_metrics_exist():
  for task in tasks.TASKS.values():
    assert set(task.metrics) <= metrics.METRICS.keys(), task.name


def test_an_unknown_metric_is_named_with_the_nearest():
  with pytest.raises(LoraxError, match="'acuracy'; did you mean 'accuracy'"):
    metrics.compute(["acuracy"], _logits([0]), np.array([0]))


def test_fewer_predictions_than_labels_is_an_error():
  with pytest.raises(LoraxError, match="1 predictions for 2 labels"):
    metrics.compute(["accuracy"], _logits([0]), np.array([0, 1]))


def test_perplexity_is_of_the_loss_and_smaller_is_better():
  loss = Mean(6.0, 3.0)
  names = ["perplexity", "accuracy"]
  assert metrics.of_loss(names, loss) == {
    "perplexity": pytest.approx(np.exp(2.0)),
    "loss": 2.0,
  }
  assert metrics.of_loss(["perplexity"], Mean(1e4, 1.0))["perplexity"] == np.inf
  better = {name: metric.better(1.0, 2.0) for name, metric in metrics.METRICS.items()}
  assert [name for name, smaller in better.items() if smaller] == [
    *("eval_loss", "perplexity"),
  ]
  # No predictions are asked for, unless another metric needs them.
  assert metrics.compute(["perplexity"], None, None) == {}
  with pytest.raises(LoraxError, match="accuracy is of predictions, and none are"):
    metrics.compute(names, None, None)


def test_means_merge_by_weight():
  whole = Mean(jnp.float32(6.0), jnp.float32(3.0)) + Mean(
    jnp.float32(1.0), jnp.float32(1.0)
  )
  assert whole.value() == pytest.approx(7 / 4)
