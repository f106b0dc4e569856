"""Softmax attention with a trained bias on its logits.

Shapes: B batch, T queries, S keys, H heads, K head size.
"""

import jax
import jax.numpy as jnp

from lorax_flax.models.ops import order


def biased_attention(
  q_BxTxHxK: jax.Array,
  k_BxSxHxK: jax.Array,
  v_BxSxHxK: jax.Array,
  bias_HxTxS: jax.Array,
  seen_BxTxS: jax.Array,
  *,
  scale: float,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
) -> jax.Array:
  """Attention whose logits get a bias, through which gradients flow; float32 softmax.

  Args:
    bias_HxTxS: added to the scaled logits.
    seen_BxTxS: true where a query attends to a key; axes of size 1 are broadcast.
    scale: of the product of query and key.
    dropout_rate: of the attention weights; applied when `dropout_rng` is given.

  Returns:
    BxTxHxK, in v's dtype. A row whose keys are all masked attends uniformly.
  """
  dtype, wide = v_BxSxHxK.dtype, order.wide(v_BxSxHxK.dtype)
  logits_BxHxTxS = jnp.einsum(
    "BTHK,BSHK->BHTS", q_BxTxHxK, k_BxSxHxK, preferred_element_type=wide
  )
  logits_BxHxTxS = logits_BxHxTxS * scale + bias_HxTxS[None].astype(wide)
  # Added rather than selected: the most negative float leaves a masked row finite.
  hidden_BxTxS = jnp.where(seen_BxTxS, 0.0, jnp.finfo(wide).min).astype(wide)
  weights = jax.nn.softmax(logits_BxHxTxS + hidden_BxTxS[:, None], axis=-1)
  weights = weights.astype(dtype)
  if dropout_rng is not None and dropout_rate > 0.0:
    kept = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, weights.shape)
    weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
  mixed = jnp.einsum("BHTS,BSHK->BTHK", weights, v_BxSxHxK, preferred_element_type=wide)
  return mixed.astype(dtype)
