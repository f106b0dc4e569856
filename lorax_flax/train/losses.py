"""Losses per example, in float32."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.data.sequences import IGNORED

# outputs, batch -> losses_B. Those here read the batch's `labels`: (B,) beside logits
# (B, C), or token ids (B, T) beside logits (B, T, V).
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


def next_token(label_smoothing: float = 0.0) -> Loss:
  """Cross entropy of the next token, averaged over an example's tokens.

  transformers' loss of a causal language model is the mean over a batch's tokens: an
  example's weight is then `targets` of it.

  Labels are the token ids themselves, place by place, or IGNORED.
  """

  def loss(logits_BxTxV: jax.Array, batch: Batch) -> jax.Array:
    labels_BxT = batch["labels"]
    logp_BxTxV = jax.nn.log_softmax(logits_BxTxV[:, :-1].astype(jnp.float32))
    next_BxT = labels_BxT[:, 1:]
    # Picked by a sum: a vocabulary that is sharded need not be gathered for it.
    vocab_V = jnp.arange(logp_BxTxV.shape[-1], dtype=next_BxT.dtype)
    right_BxTxV = next_BxT[..., None] == vocab_V[None, None]
    picked_BxT = jnp.where(right_BxTxV, logp_BxTxV, 0.0).sum(-1)
    losses_BxT = -(1.0 - label_smoothing) * picked_BxT
    losses_BxT -= label_smoothing * logp_BxTxV.mean(-1)
    counted_BxT = next_BxT != IGNORED
    sum_B = jnp.where(counted_BxT, losses_BxT, 0.0).sum(-1)
    return sum_B / jnp.maximum(targets(labels_BxT), 1.0)

  return loss


def targets(labels_BxT: jax.Array) -> jax.Array:
  """Number of predicted tokens of each example, float32 (B,)."""
  return (labels_BxT[:, 1:] != IGNORED).sum(-1).astype(jnp.float32)
