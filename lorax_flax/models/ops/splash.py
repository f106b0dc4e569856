"""Attention on TPUs by JAX's splash kernel, which writes no array of queries by keys.

Shapes: as in `ops.attention`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lorax_flax.models.ops import order, sharded

_LANES = 128
# Numbers of rows and columns of the kernel's blocks, of which the largest that divides
# the length is taken.
_BLOCKS = (512, 256, _LANES)


def takes(
  q: Any, k: Any, *, causal: bool, window: Any, softcap: float | None, dropout: bool
) -> bool:
  """True for what the kernel computes, on the mesh of the context.

  Args:
    q, k: BxTxHxK and BxSxGxK, arrays or their shapes and dtypes.
    window: of `attention`; a traced one is of layers that are scanned and differ.
    dropout: whether weights are dropped.
  """
  del causal, softcap  # Either is computed.
  is_static = window is None or isinstance(window, int)
  queries = q.shape[1] // sharded.query_shards()
  if dropout or not is_static or min(queries, k.shape[1]) < _LANES:
    return False
  return sharded.fits(q.shape[0], k.shape[2])


def attention(
  q_BxTxHxK: jax.Array,
  k_BxSxGxK: jax.Array,
  v_BxSxGxK: jax.Array,
  mask_BxS: jax.Array,
  *,
  causal: bool,
  window: int | None,
  scale: float,
  softcap: float | None,
  interpret: bool = False,
) -> jax.Array:
  """`ops.attention` of what `takes` allows; a row whose keys are all masked may differ.

  Args:
    interpret: the kernel is interpreted, on any platform.
  """
  # Here, since it takes long to import, and is of one platform.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  t, s, dtype = q_BxTxHxK.shape[1], k_BxSxGxK.shape[1], v_BxSxGxK.dtype
  wide = order.wide(dtype)
  q_BxTxHxK = (q_BxTxHxK.astype(wide) * scale).astype(dtype)
  # The kernel lets a query attend to keys with its own number alone.
  keys_BxS = mask_BxS.astype(jnp.int32)
  if causal:
    queries_BxT = keys_BxS[:, s - t :]
  else:
    keys_BxS = (keys_BxS != 0).astype(jnp.int32)
    queries_BxT = jnp.ones((q_BxTxHxK.shape[0], t), jnp.int32)

  ways = sharded.query_shards()
  q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, queries_BxT, keys_BxS = (
    _filled(x, ways) for x in (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, queries_BxT, keys_BxS)
  )
  lengths = q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]
  if window is not None:
    mask: Any = splash.LocalMask(lengths, (window - 1, 0), s - t)
  elif causal:
    mask = splash.CausalMask(lengths, s - t)
  else:  # The same for each shard of the queries.
    mask = splash.FullMask((lengths[0] // ways, lengths[1]))
  shards = ways if causal else 1
  kernel = _kernel(mask, q_BxTxHxK.shape[2], shards, softcap, interpret)

  def run(first, q, k, v, queries, keys, kernel):
    del first  # The kernel's shard has the places of its queries.

    def of_row(kernel, q_HxTxK, k_GxSxK, v_GxSxK, queries_T, keys_S):
      ids = splash.SegmentIds(queries_T, keys_S)
      return kernel(q_HxTxK, k_GxSxK, v_GxSxK, segment_ids=ids)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    # The kernel writes the sum of a query's exponentials to 128 lanes, and keeps one.
    of_rows = order.with_residuals(jax.vmap(of_row, in_axes=(None, *[0] * 5)))
    return of_rows(kernel, q, k, v, queries, keys).swapaxes(1, 2)

  def specs(rows, tokens, heads):  # The mask is the same for all rows and heads.
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(None, tokens if causal else None)
    return kernel.manual_sharding_spec(NamedSharding(mesh, spec))

  operands = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, queries_BxT, keys_BxS)
  y_BxTxHxK = sharded.on_mesh(run, *operands, (kernel, specs))
  return y_BxTxHxK[:, :t].astype(dtype)


def _kernel(
  mask: Any, heads: int, shards: int, softcap: float | None, interpret: bool
) -> Any:
  """The kernel of one row, a tree of arrays: which blocks of the mask are computed.

  Args:
    mask: of queries by keys.
    shards: number of shards of the mask's queries.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  heads //= jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
  rows, columns = _block(mask.shape[0] // shards), _block(mask.shape[1])
  sizes = splash.BlockSizes(
    block_q=rows,
    block_kv=columns,
    block_q_dkv=rows,
    block_kv_dkv=columns,
    block_q_dq=rows,
    block_kv_dq=columns,
  )
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    attn_logits_soft_cap=softcap,
    interpret=interpret,
    head_shards=1,
    q_seq_shards=shards,
    residual_checkpoint_name="attention",
  )


def _block(length: int) -> int:
  return next(size for size in _BLOCKS if length % size == 0)


def _filled(x_BxTx: jax.Array, ways: int) -> jax.Array:
  """x with zeros up to a length of full blocks in each of its shards."""
  more = -x_BxTx.shape[1] % (_LANES * ways)
  return jnp.pad(x_BxTx, [(0, 0), (0, more), *[(0, 0)] * (x_BxTx.ndim - 2)])
