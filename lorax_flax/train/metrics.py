"""Metrics: sums with counts on the device, and from all predictions on the host."""

import math
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lorax_flax.errors import LoraxError, check_known
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class Mean:
  """A mean that merges exactly: the weighted sum, and the sum of the weights."""

  total: jax.Array | float
  count: jax.Array | float

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def on_host(self) -> "Mean":
    """The mean in Python's floats, in which long sums stay exact enough."""
    return Mean(float(self.total), float(self.count))

  def value(self) -> float:
    """The mean, on the host."""
    return float(self.total) / float(self.count)


# scikit-learn and scipy are imported where they are used: they take seconds, for which
# the first step need not wait.


def _score(name: str, **options: Any) -> Callable[[np.ndarray, np.ndarray], float]:
  """A score of scikit-learn's."""

  def score(predicted_N, labels_N) -> float:
    import sklearn.metrics

    return float(getattr(sklearn.metrics, name)(labels_N, predicted_N, **options))

  return score


def _f1(**options: Any) -> Callable[[np.ndarray, np.ndarray], float]:
  # No positive anywhere makes it 0, as in GLUE.
  return _score("f1_score", zero_division=0, **options)


def _perplexity(loss: float) -> float:
  # Of a mean over tokens. One that a float can't hold is as bad as can be.
  return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
  def correlation(predicted_N, labels_N) -> float:
    import scipy.stats

    if len(labels_N) < 2:
      return 0.0
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
      value = float(getattr(scipy.stats, name)(predicted_N, labels_N).statistic)
    # Constant predictions correlate with nothing, and must not win as NaN would.
    return 0.0 if math.isnan(value) else value

  return correlation


@dataclass(frozen=True)
class Metric:
  """A metric of an evaluation.

  Attributes:
    compute: (predictions_N, labels_N) -> value, of classes, of (N, C) where a row has
      several of them, or of numbers in a regression; or (mean loss) -> value.
    of_loss: whether it is a function of the mean loss, and needs no predictions.
    better: whether a first value is better than a second.
  """

  compute: Callable[..., float]
  of_loss: bool = False
  better: Callable[[float, float], bool] = operator.gt


METRICS: dict[str, Metric] = {
  "accuracy": Metric(_score("accuracy_score")),
  "eval_loss": Metric(float, of_loss=True, better=operator.lt),
  # Of several classes at once, all of them have to be right.
  "exact_match": Metric(_score("accuracy_score")),
  # GLUE's is the positive class's.
  "f1": Metric(_f1()),
  "macro_f1": Metric(_f1(average="macro")),
  "matthews_correlation": Metric(_score("matthews_corrcoef")),
  "micro_f1": Metric(_f1(average="micro")),
  "pearson": Metric(_correlation("pearsonr")),
  "perplexity": Metric(_perplexity, of_loss=True, better=operator.lt),
  "spearman": Metric(_correlation("spearmanr")),
}


def predictions(logits_NxC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
  """Classes, or the one number of a regression head (C = 1).

  With labels (N, C), of several classes at once: 1 for each that is more probable than
  not.
  """
  if labels_N.ndim == 2:
    return (logits_NxC > 0).astype(labels_N.dtype)
  if logits_NxC.shape[-1] == 1:
    return logits_NxC[:, 0]
  return logits_NxC.argmax(-1)


def compute(
  names: Sequence[str], logits_NxC: np.ndarray | None, labels_N: np.ndarray | None
) -> dict[str, float]:
  """The metrics among `names` that are of a split's predictions.

  Args:
    names: keys of `METRICS`.
    logits_NxC, labels_N: all of the split's; None where all metrics are of the loss.

  Raises:
    LoraxError: an unknown metric, a label without a prediction, or no predictions for
      a metric that needs them.
  """
  found = {}
  for name in _chosen(names, of_loss=False):
    if logits_NxC is None or labels_N is None:
      raise LoraxError(f"{name} is of predictions, and none are kept")
    if len(logits_NxC) != len(labels_N) or not len(labels_N):
      raise LoraxError(f"{len(logits_NxC)} predictions for {len(labels_N)} labels")
    found[name] = METRICS[name].compute(predictions(logits_NxC, labels_N), labels_N)
  return found


def of_loss(names: Sequence[str], loss: Mean) -> dict[str, float]:
  """The metrics among `names` that are of the mean loss, and itself as "loss"."""
  value = loss.value()
  chosen = _chosen(names, of_loss=True)
  return {name: METRICS[name].compute(value) for name in chosen} | {"loss": value}


def _chosen(names: Sequence[str], of_loss: bool) -> list[str]:
  for name in names:
    check_known("metric", name, METRICS)
  return [name for name in names if METRICS[name].of_loss == of_loss]
