"""Scores of labelled tokens, without logits of all of them at once.

Shapes: B rows, T tokens of a row, c tokens of a chunk, D features, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from lorax_flax.data.sequences import IGNORED
from lorax_flax.sharding import activations

if TYPE_CHECKING:  # --help and mistakes in flags need not wait for it.
  from lorax_flax.models.head import Head

# Largest number of logits of a chunk on one device: 64 MiB in float32.
ROOM = 2**24


class TokenScores(NamedTuple):
  """Means over the labelled tokens of each row, float32 (B,); 0 where none is labelled.

  Attributes:
    log_prob: of the label's log-probability.
    spread: of the log-probabilities of all tokens, as label smoothing takes them.
  """

  log_prob: jax.Array
  spread: jax.Array


def token_scores(
  head: Head, x_BxTxD: jax.Array, labels_BxT: jax.Array, room: int = ROOM
) -> TokenScores:
  """Scores of the labels that the head is to give at each position.

  Logits exist for some tokens at a time; the backward pass computes them again.

  Args:
    labels_BxT: token ids, or IGNORED.
    room: largest number of logits of a device at a time.
  """
  size = _chunk_size(head, x_BxTxD, room)
  if size >= x_BxTxD.shape[1]:
    sums = _sums(head, x_BxTxD, labels_BxT)
  else:

    @jax.checkpoint
    def add(sums: TokenScores, chunk: tuple[jax.Array, jax.Array]):
      x_BxcxD, labels_Bxc = activations.shard_rows(chunk)
      return jax.tree.map(jnp.add, sums, _sums(head, x_BxcxD, labels_Bxc)), None

    zeros_B = jnp.zeros(labels_BxT.shape[0], jnp.float32)
    chunks = (_split(x_BxTxD, size, 0), _split(labels_BxT, size, IGNORED))
    sums, _ = jax.lax.scan(add, TokenScores(zeros_B, zeros_B), chunks)
  number_B = jnp.maximum(count(labels_BxT), 1.0)
  return TokenScores(*(sum_B / number_B for sum_B in sums))


def next_labels(labels_BxT: jax.Array) -> jax.Array:
  """The label that each position is to give: the next one's; none for the last."""
  end_Bx1 = jnp.full_like(labels_BxT[:, :1], IGNORED)
  return jnp.concatenate([labels_BxT[:, 1:], end_Bx1], axis=1)


def count(labels_BxT: jax.Array) -> jax.Array:
  """Number of labelled tokens of each row, float32 (B,)."""
  return (labels_BxT != IGNORED).sum(-1).astype(jnp.float32)


def _sums(head: Head, x_BxTxD: jax.Array, labels_BxT: jax.Array) -> TokenScores:
  logits_BxTxV = head(x_BxTxD).astype(jnp.float32)
  total_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
  # Picked by a sum: a vocabulary that is sharded need not be gathered for it.
  vocab_V = jnp.arange(logits_BxTxV.shape[-1], dtype=labels_BxT.dtype)
  right_BxTxV = labels_BxT[..., None] == vocab_V[None, None]
  picked_BxT = jnp.where(right_BxTxV, logits_BxTxV, 0.0).sum(-1)

  def sum_of(log_prob_BxT: jax.Array) -> jax.Array:
    return jnp.where(labels_BxT != IGNORED, log_prob_BxT, 0.0).sum(-1)

  return TokenScores(
    sum_of(picked_BxT - total_BxT), sum_of(logits_BxTxV.mean(-1) - total_BxT)
  )


def _chunk_size(head: Head, x_BxTxD: jax.Array, room: int) -> int:
  """Number of a row's tokens in a chunk, a multiple of 8 where that many fit."""
  rows = x_BxTxD.shape[0]
  vocabulary = jax.eval_shape(head, x_BxTxD[:, :1]).shape[-1]
  mesh = jax.sharding.get_abstract_mesh()
  if activations.can_shard_rows(mesh, x_BxTxD):
    rows //= activations.num_shards(mesh.shape)
  vocabulary = -(-vocabulary // mesh.shape.get("tensor", 1))
  size = max(1, room // (rows * vocabulary))
  return size - size % 8 if size > 8 else size


def _split(x_BxT: jax.Array, size: int, fill: int) -> jax.Array:
  """Chunks along T, (N, B, size, …), the last one filled up."""
  rows, length, *rest = x_BxT.shape
  count = -(-length // size)
  widths = [(0, 0), (0, count * size - length), *[(0, 0)] * len(rest)]
  padded = jnp.pad(x_BxT, widths, constant_values=fill)
  return jnp.swapaxes(padded.reshape(rows, count, size, *rest), 0, 1)
