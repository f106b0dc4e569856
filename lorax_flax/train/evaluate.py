"""Evaluation: every example of every split once, metrics from all predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.train import metrics
from lorax_flax.train.metrics import Mean

Batches = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Evaluation:
  """What one evaluation found.

  Attributes:
    metrics: GLUE's names and "loss", over all splits together; where there are several
      splits also each split's own, "accuracy_matched" of "validation_matched".
    examples: how many were evaluated.
  """

  metrics: dict[str, float]
  examples: int


def evaluate(
  step: Callable[[Any, Any, Any], tuple[jax.Array, Mean]],
  trained: Any,
  base: Any,
  splits: Mapping[str, Batches],
  names: Sequence[str],
) -> Evaluation:
  """Evaluates all splits.

  Args:
    step: as `lorax_flax.train.step.eval_step` makes it.
    splits: batches by the split's name; each has `labels`, `weights`, and `index`, the
      example's number in its split, -1 in rows that are no example.
    names: keys of `metrics.METRICS`.

  Raises:
    LoraxError: a split without examples, or batches that miss or repeat one.
  """
  found: dict[str, float] = {}
  whole = []
  for split, batches in splits.items():
    logits_NxC, labels_N, loss = _predict(step, trained, base, split, batches)
    whole.append((logits_NxC, labels_N, loss))
    if len(splits) > 1:
      values = metrics.compute(names, logits_NxC, labels_N) | {"loss": loss.value()}
      short = split.removeprefix("validation_")
      found |= {f"{name}_{short}": value for name, value in values.items()}
  logits_NxC = np.concatenate([logits for logits, _, _ in whole])
  labels_N = np.concatenate([labels for _, labels, _ in whole])
  loss = sum((loss for _, _, loss in whole), Mean(0.0, 0.0))
  overall = metrics.compute(names, logits_NxC, labels_N) | {"loss": loss.value()}
  return Evaluation(overall | found, len(labels_N))


def _predict(
  step, trained, base, split, batches
) -> tuple[np.ndarray, np.ndarray, Mean]:
  """Logits and labels of a split in the examples' order, and the mean loss."""
  outputs = [step(trained, base, batch) for batch in batches]  # Not waited for.
  logits, labels, index, loss = [], [], [], Mean(0.0, 0.0)
  for batch, (logits_BxC, mean) in zip(batches, jax.device_get(outputs), strict=True):
    real_B = batch["weights"] > 0
    logits.append(logits_BxC[real_B])
    labels.append(batch["labels"][real_B])
    index.append(batch["index"][real_B])
    loss += mean.on_host()
  if not index:
    raise LoraxError(f"there is nothing to evaluate in {split}")
  index_N = np.concatenate(index)
  order_N = np.argsort(index_N)
  if not np.array_equal(index_N[order_N], np.arange(len(index_N))):
    raise LoraxError(f"the batches of {split} miss or repeat some of its examples")
  return np.concatenate(logits)[order_N], np.concatenate(labels)[order_N], loss
