"""A kernel of attention on a mesh: each device computes its own rows and heads."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from lorax_flax.sharding.activations import ROWS, num_shards


def fits(rows: int, heads: int) -> bool:
  """True where the mesh of the context, if any, divides rows and heads of keys."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return True
  if not {*ROWS, "tensor"} <= set(mesh.axis_names):
    return False
  return rows % num_shards(mesh.shape) == 0 and heads % mesh.shape["tensor"] == 0


def on_mesh(run: Callable[..., jax.Array], ids: int) -> Callable[..., jax.Array]:
  """`run` of q, k and v (B, T, heads, K), and arrays BxT, on each device's shards.

  Args:
    ids: number of arrays BxT.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run
  heads, rows = PartitionSpec(ROWS, None, "tensor", None), PartitionSpec(ROWS, None)
  in_specs = (heads,) * 3 + (rows,) * ids
  return jax.shard_map(run, in_specs=in_specs, out_specs=heads, check_vma=False)
