"""Metrics: sums with counts on the device, GLUE's from all predictions on the host."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import scipy.stats
import sklearn.metrics

from lorax_flax.errors import LoraxError, unknown


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
  """A mean that merges exactly: the weighted sum, and the sum of the weights."""

  total: jax.Array | float
  count: jax.Array | float

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def on_host(self) -> "Mean":
    """In Python's floats, in which long sums stay exact enough."""
    return Mean(float(self.total), float(self.count))

  def value(self) -> float:
    """The mean, on the host."""
    return float(self.total) / float(self.count)


def _accuracy(predicted_N, labels_N) -> float:
  return float(sklearn.metrics.accuracy_score(labels_N, predicted_N))


def _f1(predicted_N, labels_N) -> float:
  # GLUE's F1 is the positive class's. No positive anywhere makes it 0, as there.
  return float(sklearn.metrics.f1_score(labels_N, predicted_N, zero_division=0))


def _matthews(predicted_N, labels_N) -> float:
  return float(sklearn.metrics.matthews_corrcoef(labels_N, predicted_N))


def _correlation(function) -> Callable[[np.ndarray, np.ndarray], float]:
  def correlation(predicted_N, labels_N) -> float:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
      value = float(function(predicted_N, labels_N).statistic)
    # Constant predictions correlate with nothing, and must not win as NaN would.
    return 0.0 if math.isnan(value) else value

  return correlation


# predictions_N and labels_N (classes, or numbers in a regression) to a number.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
  "accuracy": _accuracy,
  "f1": _f1,
  "matthews_correlation": _matthews,
  "pearson": _correlation(scipy.stats.pearsonr),
  "spearman": _correlation(scipy.stats.spearmanr),
}


def predictions(logits_NxC: np.ndarray) -> np.ndarray:
  """Classes, or the one number of a regression head (C = 1)."""
  if logits_NxC.shape[-1] == 1:
    return logits_NxC[:, 0]
  return logits_NxC.argmax(-1)


def compute(
  names: Sequence[str], logits_NxC: np.ndarray, labels_N: np.ndarray
) -> dict[str, float]:
  """GLUE's metrics over all predictions of a split.

  Raises:
    LoraxError: an unknown metric, or a label without a prediction.
  """
  if len(logits_NxC) != len(labels_N) or not len(labels_N):
    raise LoraxError(f"{len(logits_NxC)} predictions for {len(labels_N)} labels")
  predicted_N = predictions(logits_NxC)
  found = {}
  for name in names:
    if name not in METRICS:
      raise LoraxError(unknown("metric", name, METRICS))
    found[name] = METRICS[name](predicted_N, labels_N)
  return found
