"""Softmax attention.

Shapes: B batch, T queries, S keys, H heads of queries, G heads of keys and values
(each serves H / G heads of queries, one after another), R = T · H / G rows of queries
that share a head of keys, K head size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorax_flax import devices
from lorax_flax.errors import LoraxError
from lorax_flax.models.ops import cudnn, order, sharded, splash

# Kernels by platform, of what their `takes` says. There nothing BxHxTxS exists.
KERNELS: dict[str, Any] = {"gpu": cudnn, "tpu": splash}


def attention(
  q_BxTxHxK: jax.Array,
  k_BxSxGxK: jax.Array,
  v_BxSxGxK: jax.Array,
  mask_BxS: jax.Array,
  *,
  causal: bool = False,
  window: int | jax.Array | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
  shared: bool = False,
) -> jax.Array:
  """Softmax attention, softmax in float32, by what suits the platform.

  Where no kernel of `KERNELS` does, one array BxHxTxS is kept for the gradient, in v's
  dtype, dropout included, beside q, k, v and the result; with `softcap` the logits are
  computed a second time.

  Args:
    mask_BxS: nonzero where a key is attended to. Causal attention keeps to segments:
      a query attends to keys of its own number alone.
    causal: no query attends to keys after its own position; the last query has the
      position of the last key.
    window: for causal attention, the maximal number of keys that a query attends to,
      its own position included. It may be traced, so that scanned layers can differ.
    scale: of the logits, by default 1/sqrt(K).
    softcap: bound c of the scaled logits: c · tanh(logits / c) (Gemma 2).
    dropout_rate: of the attention weights; applied when `dropout_rng` is given.
    shared: keys of a negative number are there for every segment, which no kernel has.

  Returns:
    BxTxHxK, in v's dtype. A row whose keys are all masked attends uniformly.

  Raises:
    LoraxError: H is not a multiple of G, or a window without `causal`.
  """
  (b, t, h, size), (s, g) = q_BxTxHxK.shape, k_BxSxGxK.shape[1:3]
  if h % g:
    raise LoraxError(f"attention: {h} heads of queries over {g} heads of keys")
  if window is not None and not causal:
    raise LoraxError("attention: a window needs causal attention")
  scale = float(size**-0.5 if scale is None else scale)
  dropout = dropout_rng is not None and dropout_rate > 0.0
  form = {"causal": causal, "window": window, "softcap": softcap}
  kernel = None if shared else KERNELS.get(devices.platform())
  if kernel is not None and kernel.takes(q_BxTxHxK, k_BxSxGxK, **form, dropout=dropout):
    return kernel.attention(
      q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask_BxS, **form, scale=scale
    )
  kept_BxHxTxS, rate = None, 0.0
  if dropout:
    assert dropout_rng is not None
    rate = dropout_rate
    kept_BxHxTxS = jax.random.bernoulli(dropout_rng, 1.0 - rate, (b, h, t, s))
  settings = (rate, scale, softcap)

  def run(first, q, k, v, own_BxT, mask_BxS, window, kept_BxHxTxS):
    (n, size, heads), groups = q.shape[:3], k.shape[2]
    repeats = heads // groups
    wide = order.wide(q.dtype)
    seen = mask_BxS[:, None, None, :] != 0
    if causal:
      places_R = jnp.tile(s - t + first + jnp.arange(size), repeats)
      back_RxS = places_R[:, None] - jnp.arange(s)[None, :]
      visible_RxS = back_RxS >= 0
      if window is not None:
        visible_RxS &= back_RxS < window
      own_BxR = jnp.tile(own_BxT, (1, repeats))
      # A query that is padding has no segment, and no use.
      same_BxRxS = own_BxR[:, :, None] == mask_BxS[:, None, :]
      same_BxRxS |= (own_BxR == 0)[..., None]
      if shared:
        same_BxRxS |= (mask_BxS < 0)[:, None, :]
      seen = seen & (visible_RxS[None] & same_BxRxS)[:, None]
    # Added rather than selected, so that a compiler may fuse it into the product; the
    # most negative float rather than -inf, so that a fully masked row stays finite.
    bias = jnp.where(seen, 0.0, jnp.finfo(wide).min).astype(wide)
    if kept_BxHxTxS is not None:
      kept_BxHxTxS = kept_BxHxTxS.reshape(n, groups, -1, s)
    return _attend(q, k, v, bias, kept_BxHxTxS, settings)

  own_BxT = mask_BxS[:, s - t :] if causal else None
  operands = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, own_BxT, mask_BxS)
  if sharded.query_shards() == 1:  # The compiler shards rows and heads by itself.
    return run(0, *operands, window, kept_BxHxTxS)
  return sharded.on_mesh(
    run,
    *operands,
    (window, lambda rows, tokens, heads: PartitionSpec()),
    (kept_BxHxTxS, lambda rows, tokens, heads: PartitionSpec(rows, heads, tokens)),
  )


def attention_by_place(
  q_BxTxHxK: jax.Array,
  k_BxGxSxK: jax.Array,
  v_BxGxSxK: jax.Array,
  places_BxT: jax.Array,
  places_BxS: jax.Array,
  *,
  window: int | jax.Array | None = None,
  bias_BxHxTxS: jax.Array | None = None,
  scale: float | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Causal attention to keys in any order, each with the place of its token.

  Keys and values have their heads first: those of a cache are then read as they are.

  Args:
    places_BxT, places_BxS: int32, of the tokens in their row; that of a key that is not
      to be attended to is negative. A query attends to keys up to its own place.
    window: the maximal number of places that a query attends to, its own included.
    bias_BxHxTxS: added to the logits, scaled and soft-capped.
    scale, softcap: as of `attention`.

  Returns:
    BxTxHxK, in v's dtype. A row without any key attends uniformly.
  """
  (b, _, h, size), (g, s) = q_BxTxHxK.shape, k_BxGxSxK.shape[1:3]
  wide = order.wide(q_BxTxHxK.dtype)
  back_BxTxS = places_BxT[:, :, None] - places_BxS[:, None, :]
  seen_BxTxS = (places_BxS[:, None, :] >= 0) & (back_BxTxS >= 0)
  if window is not None:
    seen_BxTxS &= back_BxTxS < window
  bias = jnp.where(seen_BxTxS, 0.0, jnp.finfo(wide).min).astype(wide)[:, None]
  if bias_BxHxTxS is not None:
    bias = (bias + bias_BxHxTxS.astype(wide)).reshape(b, g, -1, s)
  else:
    bias = jnp.tile(bias, (1, 1, h // g, 1))
  settings = (0.0, float(size**-0.5 if scale is None else scale), softcap)
  q_BxGxRxK = _scaled_rows(q_BxTxHxK, g, settings, v_BxGxSxK.dtype, wide)
  mixed, _, _ = _mixed(q_BxGxRxK, k_BxGxSxK, v_BxGxSxK, bias, None, settings)
  return _unrows(mixed, h)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, bias, kept_BxGxRxS, settings):
  return _fwd(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, bias, kept_BxGxRxS, settings)[0]


def _fwd(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, bias, kept_BxGxRxS, settings):
  # Heads first, and contiguous: every product is then one of plain matrices.
  q = _scaled_rows(q_BxTxHxK, k_BxSxGxK.shape[2], settings, v_BxSxGxK.dtype, bias.dtype)
  k, v = _heads_first(k_BxSxGxK), _heads_first(v_BxSxGxK)
  mixed, e_BxGxRxS, inverse = _mixed(q, k, v, bias, kept_BxGxRxS, settings)
  y_BxTxHxK = _unrows(mixed, q_BxTxHxK.shape[2])
  return y_BxTxHxK, (q, k, v, e_BxGxRxS, inverse, y_BxTxHxK)


def _scaled_rows(q_BxTxHxK, groups, settings, dtype, wide):
  return _rows((q_BxTxHxK.astype(wide) * settings[1]).astype(dtype), groups)


def _mixed(q, k, v, bias, kept_BxGxRxS, settings):
  """Values BxGxRxK mixed by the softmax; the weights less their sums; 1 / the sums."""
  rate, _, softcap = settings
  dtype, wide = v.dtype, bias.dtype
  logits_BxGxRxS = _product(q, k, 3, 3, wide)
  if softcap is not None:
    logits_BxGxRxS = softcap * jnp.tanh(logits_BxGxRxS / softcap)
  logits_BxGxRxS += bias
  highest = logits_BxGxRxS.max(-1, keepdims=True)
  # Not yet divided by its sum: dividing the result is cheaper.
  e_BxGxRxS = jnp.exp(logits_BxGxRxS - highest)
  inverse = 1.0 / ((1.0 - rate) * e_BxGxRxS.sum(-1, keepdims=True))
  e_BxGxRxS = e_BxGxRxS.astype(dtype)
  if kept_BxGxRxS is not None:
    # The sign of a weight says whether it was dropped.
    e_BxGxRxS = jnp.where(kept_BxGxRxS, e_BxGxRxS, -e_BxGxRxS)
  mixed = _product(_undropped(e_BxGxRxS, rate), v, 3, 2, wide) * inverse
  return mixed.astype(dtype), e_BxGxRxS, inverse


def _bwd(settings, kept, grad_BxTxHxK):
  # The barrier keeps the compiler from storing other forms of what is kept.
  (q, k, v, e_BxGxRxS, inverse, y_BxTxHxK), grad_BxTxHxK = lax.optimization_barrier(
    (kept, grad_BxTxHxK)
  )
  rate, scale, softcap = settings
  dtype, wide, heads = v.dtype, inverse.dtype, k.shape[1]
  grad = _rows(grad_BxTxHxK, heads).astype(wide) * inverse
  # For each row the sum over keys of weight times its gradient, from the result.
  level = (grad * _rows(y_BxTxHxK, heads).astype(wide)).sum(-1, keepdims=True)
  grad = grad.astype(dtype)
  dv = _product(_undropped(e_BxGxRxS, rate), grad, 2, 2, wide)
  d_weights = _product(grad, v, 3, 3, wide)
  weights = e_BxGxRxS.astype(wide)
  if rate:
    d_weights = jnp.where(e_BxGxRxS > 0, d_weights, 0.0)
    level, weights = level * (1.0 - rate), jnp.abs(weights)
  d_logits = weights * (d_weights - level)
  if softcap is not None:
    k, again = order.recomputed(k, q, grad)
    slope = 1.0 - jnp.square(jnp.tanh(_product(again, k, 3, 3, wide) / softcap))
    d_logits *= slope
  d_logits = d_logits.astype(dtype)
  dq = _product(d_logits, k, 3, 2, wide) * scale
  dk = _product(d_logits, q, 2, 2, wide)
  dq = _unrows(dq.astype(dtype), grad_BxTxHxK.shape[2])
  return dq, *(_heads_first(x.astype(dtype)) for x in (dk, dv)), None, None


_attend.defvjp(_fwd, _bwd)


def _undropped(e_BxGxRxS, rate):
  return jnp.maximum(e_BxGxRxS, 0) if rate else e_BxGxRxS


def _heads_first(x: jax.Array) -> jax.Array:
  """BxTxHxK to BxHxTxK, and back."""
  return x.swapaxes(1, 2)


def _rows(x_BxTxHxK: jax.Array, groups: int) -> jax.Array:
  """BxTxHxK to BxGxRxK."""
  b, _, _, size = x_BxTxHxK.shape
  return _heads_first(x_BxTxHxK).reshape(b, groups, -1, size)


def _unrows(x_BxGxRxK: jax.Array, heads: int) -> jax.Array:
  """The inverse of `_rows`."""
  b, _, _, size = x_BxGxRxK.shape
  return _heads_first(x_BxGxRxK.reshape(b, heads, -1, size))


def _product(x: jax.Array, y: jax.Array, i: int, j: int, dtype) -> jax.Array:
  """Contracts x's axis i with y's axis j, for each batch and head."""
  dims = (((i,), (j,)), ((0, 1), (0, 1)))
  return lax.dot_general(x, y, dims, preferred_element_type=dtype)
