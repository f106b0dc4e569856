"""T5's relative positions: a trained bias for each head and bucket of distances.

Source: arXiv 1910.10683, section 2.1, as transformers computes it (T5Attention).

Shapes: N distances, T queries, S keys, H heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def buckets(
  ahead_N: np.ndarray, *, bidirectional: bool, count: int, max_distance: int
) -> np.ndarray:
  """The bucket of each distance.

  Half of the buckets of a direction hold one distance each; the other half are
  logarithmically wider, up to `max_distance`, and the last one holds all larger ones.

  Args:
    ahead_N: the key's position less the query's.
    bidirectional: keys after the query have half of the buckets; otherwise they share
      that of distance 0.
    count: of all buckets.
    max_distance: the distance from which all share a bucket.

  Returns:
    N int32, from 0 to count - 1.
  """
  if bidirectional:
    count //= 2
    first_N = np.where(ahead_N > 0, count, 0)
    far_N = np.abs(ahead_N)
  else:
    first_N = np.zeros_like(ahead_N)
    far_N = np.maximum(-ahead_N, 0)
  exact = count // 2
  # In float32 as in torch, since buckets begin at integers.
  ratio_N = np.maximum(far_N, 1).astype(np.float32) / np.float32(exact)
  steps_N = np.log(ratio_N) / np.float32(np.log(max_distance / exact))
  wide_N = exact + (steps_N * np.float32(count - exact)).astype(np.int64)
  own_N = np.where(far_N < exact, far_N, np.minimum(wide_N, count - 1))
  return (first_N + own_N).astype(np.int32)


def relative_bias(
  table: nn.Embed,
  places_BxT: jax.Array,
  length: int,
  *,
  bidirectional: bool,
  max_distance: int,
) -> jax.Array:
  """The bias on attention's logits, BxHxTxS, for keys at the places from 0 on.

  Args:
    table: a row for each bucket, a column for each head.
    places_BxT: int32, of the queries, each less than length.
    length: S.
    bidirectional, max_distance: see `buckets`.
  """
  # All distances that differ, whatever the length: that of an exported program varies.
  bucket_N = buckets(
    np.arange(-max_distance, max_distance + 1),
    bidirectional=bidirectional,
    count=table.num_embeddings,
    max_distance=max_distance,
  )
  bias_NxH = table(jnp.asarray(bucket_N))
  places_S = jnp.arange(length, dtype=jnp.int32)
  ahead_BxTxS = places_S[None, None, :] - places_BxT[:, :, None]
  n_BxTxS = jnp.clip(ahead_BxTxS, -max_distance, max_distance) + max_distance
  return bias_NxH[n_BxTxS].transpose(0, 3, 1, 2)
