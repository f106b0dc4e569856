"""Scores of labelled tokens, without logits of all of them at once.

Shapes: B rows, T tokens of a row, c tokens of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from lorax_flax import devices
from lorax_flax.data.sequences import IGNORED
from lorax_flax.sharding import activations

if TYPE_CHECKING:  # --help and mistakes in flags need not wait for it.
  from lorax_flax.models.head import Head

# Largest number of logits of a chunk on one device: 64 MiB in float32. A GPU needs more
# tokens to a chunk, or it waits for the head, which each chunk reads.
_ROOM, _ROOM_OF_GPU = 2**24, 2**27


class TokenScores(NamedTuple):
  """Means over the labelled tokens of each row, float32 (B,); 0 where none is labelled.

  Attributes:
    smoothed: of the log-probability of the label, mixed with that of all tokens as
      label smoothing does; the one to differentiate.
    log_prob: of the label's log-probability; no gradient flows through it.
  """

  smoothed: jax.Array
  log_prob: jax.Array


def token_scores(
  head: Head,
  x_BxTxD: jax.Array,
  labels_BxT: jax.Array,
  label_smoothing: float = 0.0,
  room: int | None = None,
) -> TokenScores:
  """Scores of the labels that the head is to give at each position.

  Logits exist for some tokens at a time. The gradient by x is taken with them and kept,
  D numbers a token, so that the backward pass multiplies by a frozen head no more; of a
  head that is trained it computes the logits again.

  Args:
    labels_BxT: token ids, or IGNORED.
    label_smoothing: share of the other tokens in `smoothed`.
    room: largest number of logits of a device at a time; None: `room_of` the
      platform that is compiled for.
  """
  frozen = head.gathered()

  def add(sums: TokenScores, chunk: tuple[jax.Array, jax.Array]):
    x_BxcxD, labels_Bxc = activations.shard_tokens(chunk)
    more = _sums(head, frozen, x_BxcxD, labels_Bxc, label_smoothing)
    return jax.tree.map(jnp.add, sums, more), None

  zeros_B = jnp.zeros(labels_BxT.shape[0], jnp.float32)
  sums = TokenScores(zeros_B, zeros_B)
  ways = activations.token_shards(x_BxTxD.shape[1])
  size = _chunk_size(head, x_BxTxD, ways, room or room_of(devices.platform()))
  if size * ways >= x_BxTxD.shape[1]:
    sums, _ = add(sums, (x_BxTxD, labels_BxT))
  else:
    chunks = (_split(x_BxTxD, size, ways, 0), _split(labels_BxT, size, ways, IGNORED))
    sums, _ = jax.lax.scan(add, sums, chunks)
  number_B = jnp.maximum(count(labels_BxT), 1.0)
  return TokenScores(*(sum_B / number_B for sum_B in sums))


def room_of(platform: str) -> int:
  """Largest number of logits of a chunk on a device of a platform."""
  return _ROOM_OF_GPU if platform == "gpu" else _ROOM


def next_labels(labels_BxT: jax.Array) -> jax.Array:
  """The label that each position is to give: the next one's; none for the last."""
  end_Bx1 = jnp.full_like(labels_BxT[:, :1], IGNORED)
  return jnp.concatenate([labels_BxT[:, 1:], end_Bx1], axis=1)


def count(labels_BxT: jax.Array) -> jax.Array:
  """Number of labelled tokens of each row, float32 (B,)."""
  return (labels_BxT != IGNORED).sum(-1).astype(jnp.float32)


def _sums(
  head: Head,
  frozen: Head,
  x_BxcxD: jax.Array,
  labels_Bxc: jax.Array,
  label_smoothing: float,
) -> TokenScores:
  """The sums of a chunk.

  Args:
    frozen: the head, through which no gradient flows to its weight.
  """

  def scores(head: Head, x_BxcxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _plain_sums(head(x_BxcxD), labels_Bxc, label_smoothing)

  fixed_BxcxD = jax.lax.stop_gradient(x_BxcxD)
  of_x = partial(scores, frozen)
  smoothed_B, pull, log_prob_B = jax.vjp(of_x, fixed_BxcxD, has_aux=True)
  (slope_BxcxD,) = pull(jnp.ones_like(smoothed_B))
  known = jax.lax.stop_gradient((smoothed_B, log_prob_B, slope_BxcxD))
  by_head_B, _ = jax.checkpoint(partial(scores, head))(fixed_BxcxD)
  smoothed_B, log_prob_B, slope_BxcxD = known
  return TokenScores(
    _differentiable(smoothed_B, by_head_B, x_BxcxD, slope_BxcxD), log_prob_B
  )


def _plain_sums(
  logits_BxcxV: jax.Array, labels_Bxc: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
  """Sums over each row's labelled tokens, smoothed and not: (B,) each."""
  logits_BxcxV = logits_BxcxV.astype(jnp.float32)
  total_Bxc = jax.nn.logsumexp(logits_BxcxV, axis=-1)
  # Picked by a sum: a vocabulary that is sharded need not be gathered for it.
  vocab_V = jnp.arange(logits_BxcxV.shape[-1], dtype=labels_Bxc.dtype)
  right_BxcxV = labels_Bxc[..., None] == vocab_V[None, None]
  picked_Bxc = jnp.where(right_BxcxV, logits_BxcxV, 0.0).sum(-1)
  mixed_Bxc = picked_Bxc
  if label_smoothing:
    every_Bxc = logits_BxcxV.mean(-1)
    mixed_Bxc = (1.0 - label_smoothing) * picked_Bxc + label_smoothing * every_Bxc

  def sum_of(picked_Bxc: jax.Array) -> jax.Array:
    return jnp.where(labels_Bxc != IGNORED, picked_Bxc - total_Bxc, 0.0).sum(-1)

  return sum_of(mixed_Bxc), sum_of(picked_Bxc)


@jax.custom_jvp
def _differentiable(
  score_B: jax.Array, by_head_B: jax.Array, x_BxcxD: jax.Array, slope_BxcxD: jax.Array
) -> jax.Array:
  """The score, with a gradient by x that is the slope, and one by the head.

  The rest is computed only where it is needed: the slope in a forward pass that is
  differentiated, the score again in the backward pass of a head that is trained.

  Args:
    by_head_B: the score again, as a function of the head alone.
  """
  del by_head_B, x_BxcxD, slope_BxcxD
  return score_B


@_differentiable.defjvp
def _(primals, tangents):
  score_B, _, _, slope_BxcxD = primals
  _, by_head_B, along_BxcxD, _ = tangents
  products = slope_BxcxD.astype(jnp.float32) * along_BxcxD.astype(jnp.float32)
  return score_B, by_head_B + products.sum(axis=(1, 2))


def _chunk_size(head: Head, x_BxTxD: jax.Array, ways: int, room: int) -> int:
  """Number of a row's tokens in a chunk, a multiple of 8 where that many fit.

  Args:
    ways: number of shards of the row; a chunk has this many tokens of each.
  """
  rows, length, _ = x_BxTxD.shape
  length //= ways
  vocabulary = jax.eval_shape(head, x_BxTxD[:, :1]).shape[-1]
  mesh = jax.sharding.get_abstract_mesh()
  if activations.can_shard_rows(mesh, x_BxTxD):
    rows //= activations.num_shards(mesh.shape)
  vocabulary = -(-vocabulary // mesh.shape.get("tensor", 1))
  most = max(1, room // (rows * vocabulary))
  if most <= 8:
    return most
  # As many chunks as it takes, and no longer than they need be.
  most -= most % 8
  each = -(-length // -(-length // most))
  return min(most, -(-each // 8) * 8)


def _split(x_BxT: jax.Array, size: int, ways: int, fill: int) -> jax.Array:
  """Chunks along T, (N, B, ways · size, …), the last one filled up.

  A chunk has tokens of each of the shards, so that all devices compute it.
  """
  rows, length, *rest = x_BxT.shape
  own = length // ways
  count = -(-own // size)
  x_BxWxt = x_BxT.reshape(rows, ways, own, *rest)
  widths = [(0, 0), (0, 0), (0, count * size - own), *[(0, 0)] * len(rest)]
  padded = jnp.pad(x_BxWxt, widths, constant_values=fill)
  chunks_BxWxN = padded.reshape(rows, ways, count, size, *rest)
  return jnp.moveaxis(chunks_BxWxN, 2, 0).reshape(count, rows, ways * size, *rest)
