"""Probabilities of a classifier's labels."""

import numpy as np
from scipy import special


def scores(logits: np.ndarray, problem_type: str | None) -> np.ndarray:
  """Probabilities, float64, each label's own where a text may have several.

  A regression's value is as it is.

  Args:
    logits: (…, C).
    problem_type: transformers' name of the problem.
  """
  if problem_type == "regression":
    return logits
  if problem_type == "multi_label_classification":
    return special.expit(logits.astype(np.float64))
  return special.softmax(logits.astype(np.float64), axis=-1)
