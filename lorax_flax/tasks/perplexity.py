"""The objective of language models: cross entropy of tokens, and perplexity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from lorax_flax.train import losses
from lorax_flax.train.objective import Objective, Throughput
from lorax_flax.train.token_scores import TokenScores, token_scores

if TYPE_CHECKING:
  from lorax_flax.models.head import Head


def objective(
  labels: Callable[[losses.Batch], jax.Array], throughput: Throughput
) -> Callable[[float], Objective]:
  """Makes (label smoothing) -> objective; loss and perplexity are means over tokens.

  Args:
    labels: (batch) -> the token id that each position is to give, or IGNORED.
  """

  def smoothed(label_smoothing: float) -> Objective:
    def readout(head: Head, x_BxTxD: jax.Array, batch: losses.Batch) -> TokenScores:
      return token_scores(head, x_BxTxD, labels(batch), label_smoothing)

    return Objective(
      loss=losses.next_token,
      eval_loss=losses.unsmoothed_next_token,
      metrics=("perplexity",),
      primary="perplexity",
      predictions=lambda scores: None,
      throughput=throughput,
      readout=readout,
    )

  return smoothed
