"""Softmax attention.

Shapes: B batch, T queries, S keys, H heads, K head size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax.models.ops import precision


def attention(
  q_BxTxHxK: jax.Array,
  k_BxSxHxK: jax.Array,
  v_BxSxHxK: jax.Array,
  mask_BxS: jax.Array,
  *,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
) -> jax.Array:
  """Bidirectional softmax attention, scaled by 1/sqrt(K), softmax in float32.

  Kept for the gradient, beside q, k, v and the result: one array BxHxTxS in v's dtype,
  dropout included.

  Args:
    mask_BxS: nonzero where a key is attended to.
    dropout_rate: of the attention weights; applied when `dropout_rng` is given.

  Returns:
    BxTxHxK, in v's dtype. A row whose keys are all masked attends uniformly.
  """
  wide = precision.wide(q_BxTxHxK.dtype)
  # Added rather than selected, so that a compiler may fuse it into the product; the
  # most negative float rather than -inf, so that a fully masked row stays finite.
  lowest = jnp.finfo(wide).min
  bias_Bx1x1xS = jnp.where(mask_BxS[:, None, None, :] != 0, 0.0, lowest).astype(wide)
  kept_BxHxTxS, rate = None, 0.0
  if dropout_rng is not None and dropout_rate > 0.0:
    (b, t, h, _), s = q_BxTxHxK.shape, k_BxSxHxK.shape[1]
    rate = dropout_rate
    kept_BxHxTxS = jax.random.bernoulli(dropout_rng, 1.0 - rate, (b, h, t, s))
  return _attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_Bx1x1xS, kept_BxHxTxS, rate)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_Bx1x1xS, kept_BxHxTxS, rate):
  return _fwd(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_Bx1x1xS, kept_BxHxTxS, rate)[0]


def _fwd(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_Bx1x1xS, kept_BxHxTxS, rate):
  dtype, wide = v_BxSxHxK.dtype, bias_Bx1x1xS.dtype
  scale = q_BxTxHxK.shape[-1] ** -0.5
  # Heads first, and contiguous: every product is then one of plain matrices.
  q = _heads_first((q_BxTxHxK.astype(wide) * scale).astype(dtype))
  k, v = _heads_first(k_BxSxHxK), _heads_first(v_BxSxHxK)
  logits_BxHxTxS = _product(q, k, 3, 3, wide) + bias_Bx1x1xS
  highest = logits_BxHxTxS.max(-1, keepdims=True)
  # Not yet divided by its sum: dividing the result is cheaper.
  e_BxHxTxS = jnp.exp(logits_BxHxTxS - highest)
  inverse = 1.0 / ((1.0 - rate) * e_BxHxTxS.sum(-1, keepdims=True))
  e_BxHxTxS = e_BxHxTxS.astype(dtype)
  if kept_BxHxTxS is not None:
    # The sign of a weight says whether it was dropped.
    e_BxHxTxS = jnp.where(kept_BxHxTxS, e_BxHxTxS, -e_BxHxTxS)
  mixed = _product(_undropped(e_BxHxTxS, rate), v, 3, 2, wide) * inverse
  y_BxTxHxK = _heads_first(mixed.astype(dtype))
  return y_BxTxHxK, (q, k, v, e_BxHxTxS, inverse, y_BxTxHxK)


def _bwd(rate, kept, grad_BxTxHxK):
  # The barrier keeps the compiler from storing other forms of what is kept.
  (q, k, v, e_BxHxTxS, inverse, y_BxTxHxK), grad_BxTxHxK = lax.optimization_barrier(
    (kept, grad_BxTxHxK)
  )
  dtype, wide = v.dtype, inverse.dtype
  scale = q.shape[-1] ** -0.5
  grad = _heads_first(grad_BxTxHxK).astype(wide) * inverse
  # Of a row, the sum over keys of weight times its gradient, by way of the result.
  level = (grad * _heads_first(y_BxTxHxK).astype(wide)).sum(-1, keepdims=True)
  grad = grad.astype(dtype)
  dv = _product(_undropped(e_BxHxTxS, rate), grad, 2, 2, wide)
  d_weights = _product(grad, v, 3, 3, wide)
  weights = e_BxHxTxS.astype(wide)
  if rate:
    d_weights = jnp.where(e_BxHxTxS > 0, d_weights, 0.0)
    level, weights = level * (1.0 - rate), jnp.abs(weights)
  d_logits = (weights * (d_weights - level)).astype(dtype)
  dq = _product(d_logits, k, 3, 2, wide) * scale
  dk = _product(d_logits, q, 2, 2, wide)
  return *(_heads_first(x.astype(dtype)) for x in (dq, dk, dv)), None, None


_attend.defvjp(_fwd, _bwd)


def _undropped(e_BxHxTxS, rate):
  return jnp.maximum(e_BxHxTxS, 0) if rate else e_BxHxTxS


def _heads_first(x: jax.Array) -> jax.Array:
  """BxTxHxK to BxHxTxK, and back."""
  return x.swapaxes(1, 2)


def _product(x: jax.Array, y: jax.Array, i: int, j: int, dtype) -> jax.Array:
  """Of each batch and head: contracts x's axis i with y's axis j."""
  dims = (((i,), (j,)), ((0, 1), (0, 1)))
  return lax.dot_general(x, y, dims, preferred_element_type=dtype)
