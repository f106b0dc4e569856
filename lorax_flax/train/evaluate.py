"""Evaluation: every example of every split once, metrics from all predictions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.train import metrics
from lorax_flax.train.metrics import Mean
from lorax_flax.train.report import Report

Batches = Sequence[Mapping[str, np.ndarray]]
# The predictions kept of a batch, and the mean loss.
Output = tuple[np.ndarray | None, Mean]
# logits_NxC and labels_N in the examples' order; None where a step keeps no logits.
_Rows = tuple[np.ndarray | None, np.ndarray | None]


class NotFinite(LoraxError):
  """An evaluation that would count predictions or losses that are no numbers."""


@dataclass(frozen=True)
class Evaluation:
  """Metrics of one evaluation.

  Attributes:
    metrics: by name, and "loss", over all splits together; where there are several
      splits also each split's own, "accuracy_matched" of "validation_matched".
    examples: number of examples that were evaluated.
    report: of all splits together, where one is requested.
  """

  metrics: dict[str, float]
  examples: int
  report: dict[str, Any] | None = None

  def named(self) -> dict[str, float]:
    """The metrics as a result names them: "eval_loss" is not the training loss."""
    return {"eval_loss" if n == "loss" else n: x for n, x in self.metrics.items()}


def evaluate(
  outputs: Mapping[str, Sequence[Output]],
  splits: Mapping[str, Batches],
  names: Sequence[str],
  report: Report | None = None,
) -> Evaluation:
  """Evaluates all splits.

  Args:
    outputs: results of `lorax_flax.train.step.eval_step` on the host, one for each
      batch, by the split's name.
    splits: batches by the split's name; each has `index`, the example's number in its
      split, -1 in rows that are padding, and `labels` where metrics need them.
    names: keys of `metrics.METRICS`.
    report: makes one of all predictions.

  Raises:
    LoraxError: a split without examples, or batches that miss or repeat one.
    NotFinite: a prediction or a loss is not finite; it names the example.
  """
  found: dict[str, float] = {}
  parts = []
  for split, batches in splits.items():
    part = _predict(outputs[split], split, batches)
    parts.append(part)
    if len(splits) > 1:
      short = split.removeprefix("validation_")
      values = _metrics(names, part.rows, part.loss)
      found |= {f"{name}_{short}": value for name, value in values.items()}
  loss = sum((part.loss for part in parts), Mean(0.0, 0.0))
  rows = _joined([part.rows for part in parts])
  return Evaluation(
    _metrics(names, rows, loss) | found,
    sum(part.examples for part in parts),
    None if report is None else report(*rows),
  )


def _metrics(names: Sequence[str], rows: _Rows, loss: Mean) -> dict[str, float]:
  return metrics.compute(names, *rows) | metrics.of_loss(names, loss)


class _Predicted(NamedTuple):
  rows: _Rows
  loss: Mean
  examples: int


def _predict(outputs: Sequence[Output], split: str, batches: Batches) -> _Predicted:
  rows, index, loss = [], [], Mean(0.0, 0.0)
  for batch, (kept, mean) in zip(batches, outputs, strict=True):
    real_B = batch["index"] >= 0
    both = (kept, None if kept is None else batch["labels"])
    rows.append(jax.tree.map(lambda x, real_B=real_B: x[real_B], both))
    index.append(batch["index"][real_B])
    loss += mean.on_host()
  if not index:
    raise LoraxError(f"there is nothing to evaluate in {split}")
  index_N = np.concatenate(index)
  order_N = np.argsort(index_N)
  if not np.array_equal(index_N[order_N], np.arange(len(index_N))):
    raise LoraxError(f"the batches of {split} miss or repeat some of its examples")
  ordered = jax.tree.map(lambda x: x[order_N], _joined(rows))
  _check_finite(split, ordered[0], loss)
  return _Predicted(ordered, loss, len(index_N))


def _check_finite(split: str, kept_NxC: np.ndarray | None, loss: Mean) -> None:
  # The argmax of NaN is class 0, which would count as right or wrong.
  for x_NxC in jax.tree.leaves(kept_NxC):
    wrong_N = ~np.isfinite(x_NxC).reshape(len(x_NxC), -1).all(-1)
    if wrong_N.any():
      number = int(np.argmax(wrong_N)) + 1
      raise NotFinite(f"example {number} of {split} gives logits that are not finite")
  if not math.isfinite(loss.value()):
    raise NotFinite(f"the loss of {split} is {loss.value()}")


def _joined(parts):
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
