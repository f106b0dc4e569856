"""Per-class scores and the confusion table of an evaluation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# (logits_NxC, labels_N) -> a JSON-able report of all predictions of an evaluation.
Report = Callable[[np.ndarray, np.ndarray], dict[str, Any]]

# A confusion table has the square of this number of entries.
_MOST_CLASSES = 200


def of_classes(names: Sequence[str]) -> Report:
  """The report of classes, by their names.

  It has `classes`, each with `precision`, `recall`, `f1` and `support`; their mean
  `macro_f1`, over the classes that occur; and `confusion`, with `labels` and `rows`: of
  each true class, the number of examples by predicted class. That is left out where an
  example has several classes, or there are more than 200.
  """
  return functools.partial(_report, names)


def _report(
  names: Sequence[str], logits_NxC: np.ndarray, labels_N: np.ndarray
) -> dict[str, Any]:
  # Here, since --help and mistakes in flags need not wait for them.
  import sklearn.metrics

  from lorax_flax.train import metrics

  predicted_N = metrics.predictions(logits_NxC, labels_N)
  numbers = range(len(names))
  columns = sklearn.metrics.precision_recall_fscore_support(
    labels_N, predicted_N, labels=numbers, zero_division=0
  )
  scores = ("precision", "recall", "f1", "support")
  found = {
    "macro_f1": metrics.METRICS["macro_f1"].compute(predicted_N, labels_N),
    "classes": {
      name: dict(zip(scores, (*map(float, row[:3]), int(row[3])), strict=True))
      for name, row in zip(names, zip(*columns, strict=True), strict=True)
    },
  }
  if labels_N.ndim == 1 and len(names) <= _MOST_CLASSES:
    rows = sklearn.metrics.confusion_matrix(labels_N, predicted_N, labels=numbers)
    found["confusion"] = {"labels": list(names), "rows": rows.tolist()}
  return found
