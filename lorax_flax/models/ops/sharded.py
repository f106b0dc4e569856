"""Attention on a mesh: each device computes its own rows, queries and heads."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from lorax_flax.sharding.activations import ROWS, TOKENS, num_shards

_AXES = {*ROWS, TOKENS, "tensor"}


def fits(rows: int, heads: int) -> bool:
  """True where the mesh of the context, if any, divides rows and heads of keys."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return True
  if not set(mesh.axis_names) >= _AXES:
    return False
  return rows % num_shards(mesh.shape) == 0 and heads % mesh.shape["tensor"] == 0


def query_shards() -> int:
  """Number of devices of the mesh of the context that share a row's queries."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[TOKENS] if set(mesh.axis_names) >= _AXES else 1


# (axes of rows, of tokens and of heads on the mesh, or None) -> partition specs
Specs = Callable[[Any, Any, Any], Any]


def on_mesh(
  run: Callable[..., jax.Array],
  q_BxTxHxK: jax.Array,
  k_BxSxGxK: jax.Array,
  v_BxSxGxK: jax.Array,
  ids_BxT: jax.Array | None,
  ids_BxS: jax.Array,
  *more: tuple[Any, Specs],
) -> jax.Array:
  """`run` on each device's shards, BxTxHxK.

  Along the axis of tokens a device has its own queries and, gathered, all keys. What
  the axes do not divide is replicated.

  Args:
    run: (number of its first query, q, k, v, ids_BxT, ids_BxS, *more) -> BxTxHxK.
    ids_BxT, ids_BxS: of queries and of keys.
    more: further arguments, each a tree of arrays and its specs.
  """
  mesh, trees = jax.sharding.get_abstract_mesh(), [tree for tree, _ in more]
  operands = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, ids_BxT, ids_BxS)
  if mesh.empty or mesh.size == 1:
    return run(0, *operands, *trees)
  (b, t), (s, g), ways = q_BxTxHxK.shape[:2], k_BxSxGxK.shape[1:3], query_shards()
  rows = ROWS if b % num_shards(mesh.shape) == 0 else None
  heads = "tensor" if g % mesh.shape["tensor"] == 0 else None
  tokens = TOKENS if ways > 1 and t % ways == 0 and s % ways == 0 else None

  def of_device(q, k, v, *rest):
    if tokens is None:
      return run(0, q, k, v, *rest)
    k, v = (lax.all_gather(x, tokens, axis=1, tiled=True) for x in (k, v))
    return run(lax.axis_index(tokens) * q.shape[1], q, k, v, *rest)

  of_heads = PartitionSpec(rows, tokens, heads, None)
  ids = (PartitionSpec(rows, tokens), PartitionSpec(rows, None))
  in_specs = (*(of_heads,) * 3, *ids, *(spec(rows, tokens, heads) for _, spec in more))
  sharded = jax.shard_map(
    of_device, in_specs=in_specs, out_specs=of_heads, check_vma=False
  )
  return sharded(*operands, *trees)
