"""Losses of one example each, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# logits_BxC, labels_B -> losses_B
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
