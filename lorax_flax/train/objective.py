"""The objective of a training: loss, metrics, and the unit of throughput."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.train.losses import Loss

if TYPE_CHECKING:  # --help and mistakes in flags need not wait for these.
  from lorax_flax.models.head import Head
  from lorax_flax.train.report import Report

# outputs -> the array or None that evaluation keeps of them on the host, (B, …)
Predictions = Callable[[Any], jax.Array | None]


def logits(logits_BxC: jax.Array) -> jax.Array:
  """All logits, float32."""
  return logits_BxC.astype(jnp.float32)


@dataclass(frozen=True)
class Throughput:
  """The unit in which progress and speed are counted.

  Attributes:
    unit: its plural, "tokens".
    columns: the columns of a batch that have an entry for each, with the value that
      padding has, and only padding.
  """

  unit: str = "examples"
  columns: Mapping[str, int] = field(default_factory=lambda: {"weights": 0})

  def count(self, batch: Mapping[str, np.ndarray]) -> int:
    """Number of units in a batch on the host."""
    return sum(int((batch[n] != padding).sum()) for n, padding in self.columns.items())

  def padded(self, batch: Mapping[str, Any]) -> int:
    """Number of units that the model computes for a batch, padding included."""
    return sum(int(np.prod(batch[name].shape)) for name in self.columns)


# Tokens of a text model.
TOKENS = Throughput("tokens", {"attention_mask": 0})


@dataclass(frozen=True)
class Objective:
  """Loss, metrics and throughput of a task.

  Attributes:
    loss: per example; a batch's `weights` scale it.
    metrics: keys of `metrics.METRICS`.
    primary: the metric that picks the best evaluation.
    eval_loss: the loss in evaluations; None: the same.
    predictions: selects what metrics need of a model's outputs.
    throughput: what progress and speed are counted in.
    readout: (head, x_BxTxD, batch) -> outputs, of a model with a language model's head;
      None: the model's own outputs.
    report: of the best evaluation, for result.json, besides its metrics; None: none.
  """

  loss: Loss
  metrics: Sequence[str]
  primary: str
  eval_loss: Loss | None = None
  predictions: Predictions = logits
  throughput: Throughput = field(default_factory=Throughput)
  readout: Callable[[Head, jax.Array, Mapping[str, jax.Array]], Any] | None = None
  report: Report | None = None
