"""Losses of one example each, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lorax_flax.data.sequences import IGNORED

# logits_BxC, labels_B -> losses_B; of token ids logits_BxTxV, labels_BxT -> losses_B
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
  """Softmax cross entropy; torch's CrossEntropyLoss(label_smoothing=…)."""

  def loss(logits_BxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    logp_BxC = jax.nn.log_softmax(logits_BxC.astype(jnp.float32))
    picked_B = jnp.take_along_axis(logp_BxC, labels_B[:, None], axis=-1)[:, 0]
    spread_B = logp_BxC.mean(-1)
    return -(1.0 - label_smoothing) * picked_B - label_smoothing * spread_B

  return loss


def squared_error(logits_Bx1: jax.Array, labels_B: jax.Array) -> jax.Array:
  """Squared difference of the one output and a float label."""
  return jnp.square(logits_Bx1[:, 0].astype(jnp.float32) - labels_B)


def next_token(label_smoothing: float = 0.0) -> Loss:
  """Mean over an example's tokens of the next one's cross entropy.

  transformers' loss of a causal language model is the mean over a batch's tokens: an
  example's weight is then `targets` of it.

  Labels are the token ids themselves, place by place, or IGNORED.
  """

  def loss(logits_BxTxV: jax.Array, labels_BxT: jax.Array) -> jax.Array:
    logp_BxTxV = jax.nn.log_softmax(logits_BxTxV[:, :-1].astype(jnp.float32))
    next_BxT = labels_BxT[:, 1:]
    # Picked by a sum, that a vocabulary which is cut over devices is not gathered for.
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
  """How many tokens of each example are predicted, B float32."""
  return (labels_BxT[:, 1:] != IGNORED).sum(-1).astype(jnp.float32)
