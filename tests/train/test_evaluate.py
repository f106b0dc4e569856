import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.train import optim, step
from lorax_flax.train import state as states
from lorax_flax.train.evaluate import NotFinite, evaluate
from tests.train import toy


def _evaluate(splits, names=("accuracy", "f1"), **options):
  job = toy.job()
  optimizer = optim.optimizer(
    lambda step: jnp.float32(0), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0, grad_clip=1
  )
  state, base = states.create(
    job.model.params, job.runs[0].adapter, optimizer, jax.random.key(0)
  )
  run = jax.jit(step.eval_step(job.model.forward, job.objective.loss, **options))
  outputs = {
    split: jax.device_get([run(state.trained, base, batch) for batch in batches])
    for split, batches in splits.items()
  }
  return evaluate(outputs, splits, names)


def _split(count, batch_size, seed=2):
  tokens = toy.tokens(count, seed)
  shape = toy.pipeline.Shape(batch_size, (8, 24))
  return toy.pipeline.evaluation(tokens, shape)


def _whole(count, seed=2):
  return [toy.tokens(count, seed).batch(np.arange(count), 24)]


def test_every_example_counts_once_whatever_the_batch_size():
  wanted = _evaluate({"validation": _whole(37)})
  for batch_size in (5, 64):
    found = _evaluate({"validation": _split(37, batch_size)})
    assert found.examples == 37
    assert found.metrics == pytest.approx(wanted.metrics, rel=1e-5)


def test_two_splits_are_reported_by_name_and_overall():
  first, second = _whole(30, seed=3), _whole(10, seed=4)
  both = _evaluate({"validation_matched": first, "validation_mismatched": second})
  a = _evaluate({"validation": first}).metrics
  b = _evaluate({"validation": second}).metrics
  assert a["accuracy"] != b["accuracy"]
  assert both.examples == 40
  assert both.metrics["accuracy_matched"] == a["accuracy"]
  assert both.metrics["accuracy_mismatched"] == b["accuracy"]
  # Overall is over all examples, not the mean of the two.
  assert both.metrics["accuracy"] == pytest.approx(
    (30 * a["accuracy"] + 10 * b["accuracy"]) / 40
  )
  assert both.metrics["loss"] == pytest.approx(
    (30 * a["loss"] + 10 * b["loss"]) / 40, rel=1e-5
  )


def test_a_missing_or_repeated_example_is_an_error():
  batches = [dict(batch) for batch in _split(20, 8)]
  with pytest.raises(LoraxError, match="the batches of dev miss or repeat"):
    _evaluate({"dev": [*batches, batches[0]]})
  with pytest.raises(LoraxError, match="the batches of dev miss or repeat"):
    _evaluate({"dev": batches[1:]})


def test_an_empty_split_is_an_error():
  with pytest.raises(LoraxError, match="nothing to evaluate in dev"):
    _evaluate({"dev": []})


def test_without_predictions_there_are_the_metrics_of_the_loss_over_all_splits():
  splits = {"validation_a": _split(30, 8), "validation_b": _split(10, 8)}
  usual = _evaluate(splits, ("accuracy", "perplexity"))
  found = _evaluate(splits, ("perplexity",), predictions=lambda logits: None)
  assert found.examples == 40
  assert found.metrics == {
    name: value
    for name, value in usual.metrics.items()
    if not name.startswith("accuracy")
  }
  assert found.metrics["perplexity"] == pytest.approx(np.exp(found.metrics["loss"]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_is_an_error_that_names_the_example(value):
  def predictions(logits):
    return logits.at[1].set(value)

  with pytest.raises(NotFinite, match="example 2 of dev gives logits that are not"):
    _evaluate({"dev": _whole(5)}, predictions=predictions)


def test_a_loss_that_is_not_finite_is_an_error_where_no_predictions_are_kept():
  [batch] = _whole(5)
  wrong = dict(batch, weights=np.full_like(batch["weights"], np.nan))
  with pytest.raises(NotFinite, match="the loss of dev is nan"):
    _evaluate({"dev": [wrong]}, (), predictions=lambda logits: None)
