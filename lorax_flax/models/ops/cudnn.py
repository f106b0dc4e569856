"""Attention on NVIDIA GPUs by cuDNN, through JAX's own function.

Shapes: as in `ops.attention`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax.models.ops import sharded

# Of the devices that have the kernel, and of those that take larger heads.
_AMPERE, _HOPPER = 8.0, 9.0
_DTYPES = (jnp.bfloat16, jnp.float16)


def takes(
  q: Any, k: Any, *, causal: bool, window: Any, softcap: float | None, dropout: bool
) -> bool:
  """True for what the kernel computes, on the mesh and the devices of the context.

  Args:
    q, k: BxTxHxK and BxSxGxK, arrays or their shapes and dtypes.
    window: of `attention`; a traced one is of layers that are scanned and differ.
    dropout: whether weights are dropped.
  """
  is_static = window is None or isinstance(window, int)
  if dropout or softcap is not None or not is_static or q.dtype not in _DTYPES:
    return False
  (rows, t, _, size), (s, heads) = q.shape, k.shape[1:3]
  if (causal and t != s) or (t // sharded.query_shards()) % 2 or s % 2 or size % 8:
    return False
  capability = _capability()
  if capability < _AMPERE or size > (256 if capability >= _HOPPER else 128):
    return False
  return sharded.fits(rows, heads)


def _capability() -> float:
  """Compute capability of this process's GPU; 0 without one of NVIDIA's."""
  device = jax.local_devices()[0]
  if "cuda" not in device.client.platform_version:
    return 0.0
  return float(device.compute_capability)


def attention(
  q_BxTxHxK: jax.Array,
  k_BxSxGxK: jax.Array,
  v_BxSxGxK: jax.Array,
  mask_BxS: jax.Array,
  *,
  causal: bool,
  window: int | None,
  scale: float,
  softcap: float | None = None,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """`ops.attention` of what `takes` allows; queries that are padding may differ.

  The kernel knows lengths. Where each row is one segment with its padding behind it, it
  needs nothing else; where some row is not, a mask BxTxS is made and added, which costs
  it time and that memory. The mask is data, so that both are in the program.

  Args:
    implementation: of jax.nn.dot_product_attention; "xla" runs on any platform.
  """
  del softcap  # None, see `takes`.
  options: dict[str, Any] = {"scale": scale, "implementation": implementation}
  if window is not None:
    options["local_window_size"] = (window - 1, 0)

  def by_length(q, k, v, mask_BxS):
    if causal:  # No query that is used comes behind a key that is padding.
      return jax.nn.dot_product_attention(q, k, v, is_causal=True, **options)
    lengths_B = (mask_BxS != 0).sum(1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
      q, k, v, key_value_seq_lengths=lengths_B, **options
    )

  # Recomputed in the backward pass, so that no mask is kept for it.
  @jax.checkpoint
  def by_mask(q, k, v, mask_BxS):
    seen = mask_BxS[:, None, None, :] != 0
    if causal:
      seen = seen & (mask_BxS[:, None, :, None] == mask_BxS[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=causal, **options)

  # Of some of a row's queries, of which the kernel does not know the places.
  @jax.checkpoint
  def by_place(first, q, k, v, queries_BxT, mask_BxS):
    places_T = first + jnp.arange(q.shape[1])
    back_TxS = places_T[:, None] - jnp.arange(k.shape[1])[None, :]
    seen_TxS = (
      back_TxS >= 0 if window is None else (back_TxS >= 0) & (back_TxS < window)
    )
    seen = queries_BxT[:, :, None] == mask_BxS[:, None, :]
    seen = (seen & (mask_BxS != 0)[:, None, :] & seen_TxS[None])[:, None]
    return jax.nn.dot_product_attention(
      q, k, v, mask=seen, scale=scale, implementation=implementation
    )

  def run(first, q, k, v, queries_BxT, mask_BxS):
    if causal and q.shape[1] < k.shape[1]:
      return by_place(first, q, k, v, queries_BxT, mask_BxS)
    before, after = mask_BxS[:, :-1], mask_BxS[:, 1:]
    same = before == after if causal else before != 0
    by_lengths = jnp.all(same | (after == 0))
    return lax.cond(by_lengths, by_length, by_mask, q, k, v, mask_BxS)

  queries_BxT = mask_BxS[:, : q_BxTxHxK.shape[1]]
  operands = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, queries_BxT, mask_BxS)
  return sharded.on_mesh(run, *operands)
