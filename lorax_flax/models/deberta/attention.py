"""DeBERTa's disentangled attention: three products of contents and of positions.

The logit of token i attending to token j is the sum of
  query i · key j,  query i · key of the position,  query of the position · key j
over the root of the head size times the number of terms, where the position is a row of
a table of relative positions, by the distance i - j. Source: arXiv 2006.03654, as
transformers computes it (DebertaV2's DisentangledSelfAttention).

Shapes: B batch, T tokens, D features, H heads, K head size, R rows of the table, M = 2T
distances, of which the last serves `_shifted` alone.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from lorax_flax.models import layers, soft
from lorax_flax.models.deberta.config import DebertaConfig
from lorax_flax.models.layers import Part
from lorax_flax.models.ops import order


def buckets(distances: np.ndarray, count: int, max_distance: int) -> np.ndarray:
  """Buckets of distances: small ones have their own, large ones share logarithmically.

  Args:
    distances: int.
    count: of buckets to each side; those below count // 2 hold one distance each.
    max_distance: the end of the last bucket, exclusive.

  Returns:
    int32, of the same shape, from -count + 1 to count - 1; beyond for larger ones.
  """
  middle = count // 2
  # In float32, as in transformers: it decides the bucket of a distance at an edge.
  away = np.maximum(np.abs(distances), middle).astype(np.float32)
  full = np.log(np.float32((max_distance - 1) / middle))
  part = np.log(away / np.float32(middle)) / full * np.float32(middle - 1)
  far = np.ceil(part).astype(np.int32) + middle
  return np.where(np.abs(distances) <= middle, distances, np.sign(distances) * far)


def rows(config: DebertaConfig, length: int) -> Any:
  """The table's row of each distance from -length to length.

  Args:
    length: that of an exported program may be symbolic; it is at most
      max_position_embeddings.

  Returns:
    (2 length + 1,) int32, not decreasing. The two at the ends, distances that no pair
    of tokens has, repeat their neighbours if the length is a number.
  """
  longest = _longest(config, length)
  most = longest - 1
  distances = np.clip(np.arange(-longest, longest + 1, dtype=np.int32), -most, most)
  if config.position_buckets > 0:
    distances = buckets(distances, config.position_buckets, config.max_distance)
  found = np.clip(distances + config.span, 0, 2 * config.span - 1)
  if longest is length:
    return found
  return jax.lax.dynamic_slice_in_dim(found, longest - length, 2 * length + 1)


def used(config: DebertaConfig, length: int) -> np.ndarray:
  """The table's rows, from the first to the last, that a text of this length needs."""
  found = rows(config, _longest(config, length))
  return np.arange(found[0], found[-1] + 1, dtype=np.int32)


def _longest(config: DebertaConfig, length: int) -> int:
  """The length, or where it is symbolic the largest that it may stand for."""
  is_symbolic = jax.export.is_symbolic_dim(length)
  return config.max_position_embeddings if is_symbolic else length


def _shifted(x_BxHxTxM: jax.Array) -> jax.Array:
  """BxHxTxT: the T columns from T - 1 - t of each row t."""
  *outer, t, m = x_BxHxTxM.shape
  # In the flattened array, these slices begin M - 1 apart.
  flat = x_BxHxTxM.reshape((*outer, t * m))
  flat = flat[..., t - 1 : t - 1 + t * (m - 1)]
  return flat.reshape((*outer, t, m - 1))[..., :t]


def _by_distance(x_BxTxHxK: jax.Array, position_MxHxK: jax.Array, dtype) -> jax.Array:
  """BxHxTxT: each token's products with M positions, shifted to those of the tokens."""
  product_BxHxTxM = jnp.einsum(
    "bthk,mhk->bhtm", x_BxTxHxK, position_MxHxK, preferred_element_type=dtype
  )
  return _shifted(product_BxHxTxM)


def scores(
  q_BxTxHxK: jax.Array,
  k_BxTxHxK: jax.Array,
  pos_k_RxHxK: jax.Array | None,
  pos_q_RxHxK: jax.Array | None,
  rows_M1: np.ndarray | jax.Array,
  terms: int,
) -> jax.Array:
  """The logits of the softmax, BxHxTxT in float32 at least.

  Products with positions are computed once per distance, not once per pair, and then
  shifted: there is no gather, whose derivative would be a scatter.

  Args:
    pos_k_RxHxK, pos_q_RxHxK: keys and queries of the positions, for the rows in use;
      None where the model has no such term.
    rows_M1: the index among these of each distance from -T to T; see `rows`.
    terms: number of terms, for the scale.
  """
  wide = order.wide(q_BxTxHxK.dtype)
  total_BxHxTxT = jnp.einsum(
    "bthk,bshk->bhts", q_BxTxHxK, k_BxTxHxK, preferred_element_type=wide
  )
  if pos_k_RxHxK is not None:
    # Column m of row i is the distance T - 1 - m, so that token j's is T - 1 - i + j.
    total_BxHxTxT += _by_distance(q_BxTxHxK, pos_k_RxHxK[rows_M1[-2::-1]], wide)
  if pos_q_RxHxK is not None:
    # Here a row is a key: column m of row j is the distance m - T + 1, and token i's
    # is T - 1 - j + i.
    by_key = _by_distance(k_BxTxHxK, pos_q_RxHxK[rows_M1[1:]], wide)
    total_BxHxTxT += by_key.swapaxes(-1, -2)
  return total_BxHxTxT / math.sqrt(q_BxTxHxK.shape[-1] * terms)


class Attention(Part[DebertaConfig]):
  """Disentangled self-attention, its output added to its input and normed."""

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, pairs_BxTxT: jax.Array, rel_RxD: jax.Array | None
  ) -> jax.Array:
    """BxTxD.

    Args:
      pairs_BxTxT: true where both tokens are real. Padding attends uniformly.
      rel_RxD: the rows `used` of the table, or None without relative attention.
    """
    c, heads = self.config, self.config.num_attention_heads

    def dense(name, axes=("embed", "heads")):
      return self.dense(c.hidden_size, axes, name)

    def dropped(x, rate):
      return nn.Dropout(rate)(x, self.deterministic)

    query, key, value = (dense(f"{name}_proj") for name in ("query", "key", "value"))
    pos_k_RxHxK = pos_q_RxHxK = None
    if c.terms:
      rel_RxD = dropped(rel_RxD, c.hidden_dropout_prob)
    if "c2p" in c.terms:
      pos_key = key if c.share_att_key else dense("pos_key_proj")
      pos_k_RxHxK = layers.in_heads(pos_key(rel_RxD), heads)
    if "p2c" in c.terms:
      pos_query = query if c.share_att_key else dense("pos_query_proj")
      pos_q_RxHxK = layers.in_heads(pos_query(rel_RxD), heads)
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (
      layers.in_heads(project(x_BxTxD), heads) for project in (query, key, value)
    )
    length = x_BxTxD.shape[1]
    logits_BxHxTxT = scores(
      q_BxTxHxK,
      k_BxTxHxK,
      pos_k_RxHxK,
      pos_q_RxHxK,
      rows(c, length) - used(c, length)[0],
      # transformers counts the terms in the config, whether or not there is a table.
      1 + len(c.pos_att_type),
    )
    lowest = jnp.finfo(logits_BxHxTxT.dtype).min
    logits_BxHxTxT = jnp.where(pairs_BxTxT[:, None], logits_BxHxTxT, lowest)
    weights_BxHxTxT = jax.nn.softmax(logits_BxHxTxT, axis=-1).astype(self.dtype)
    weights_BxHxTxT = dropped(weights_BxHxTxT, c.attention_probs_dropout_prob)
    y_BxTxHxK = jnp.einsum("bhts,bshk->bthk", weights_BxHxTxT, v_BxTxHxK)
    y_BxTxD = dense("output", ("heads", "embed"))(y_BxTxHxK.reshape(x_BxTxD.shape))
    y_BxTxD = dropped(y_BxTxD, c.hidden_dropout_prob)
    y_BxTxD = soft.adapted(self, "attention", y_BxTxD)
    return layers.Norm(c.layer_norm_eps, name="layer_norm")(x_BxTxD + y_BxTxD)
