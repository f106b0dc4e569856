"""Losses per example, in float32."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.train.token_scores import TokenScores

# outputs, batch -> losses_B; of logits (B, C), by the batch's `labels`, (B,) or (B, C).
Batch = Mapping[str, jax.Array]
Loss = Callable[[Any, Batch], jax.Array]


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
  """Softmax cross entropy; torch's CrossEntropyLoss(label_smoothing=…)."""

  def loss(logits_BxC: jax.Array, batch: Batch) -> jax.Array:
    labels_B = batch["labels"]
    logp_BxC = jax.nn.log_softmax(logits_BxC.astype(jnp.float32))
    picked_B = jnp.take_along_axis(logp_BxC, labels_B[:, None], axis=-1)[:, 0]
    spread_B = logp_BxC.mean(-1)
    return -(1.0 - label_smoothing) * picked_B - label_smoothing * spread_B

  return loss


def squared_error(logits_Bx1: jax.Array, batch: Batch) -> jax.Array:
  """Squared difference of the one output and a float label."""
  return jnp.square(logits_Bx1[:, 0].astype(jnp.float32) - batch["labels"])


def binary_cross_entropy(logits_BxC: jax.Array, batch: Batch) -> jax.Array:
  """Mean over classes of each one's own; torch's BCEWithLogitsLoss of a row."""
  x_BxC, labels_BxC = logits_BxC.astype(jnp.float32), batch["labels"]
  has, has_not = jax.nn.log_sigmoid(x_BxC), jax.nn.log_sigmoid(-x_BxC)
  return -(labels_BxC * has + (1.0 - labels_BxC) * has_not).mean(-1)


def next_token(scores: TokenScores, batch: Batch) -> jax.Array:
  """Cross entropy of a row's labelled tokens, averaged over them.

  transformers' loss of a language model is the mean over a batch's tokens: a row's
  weight is then its number of labelled tokens.
  """
  del batch  # Its labels are in the scores.
  return -scores.smoothed


def unsmoothed_next_token(scores: TokenScores, batch: Batch) -> jax.Array:
  """`next_token` without label smoothing, of which a perplexity is; not trained on."""
  del batch
  return -scores.log_prob
