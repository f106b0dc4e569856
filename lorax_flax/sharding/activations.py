"""Sharding constraints of activations, where the compiler would choose worse."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

# The axes of a mesh along which the rows of a batch are sharded, where there is a mesh.
ROWS = ("data", "fsdp", "expert")


def ways(sizes: Mapping[str, int], axes: Sequence[str] = ROWS) -> int:
  """Number of shards of the rows.

  Args:
    sizes: of a mesh's axes, by name.
  """
  return math.prod(sizes[name] for name in axes)


def rows_come_out(mesh: Any, x_Bx: jax.Array) -> bool:
  """True where there is a mesh over which the rows of x can be sharded."""
  if not set(ROWS) <= set(mesh.axis_names):
    return False
  shards = ways(mesh.shape)
  return shards > 1 and x_Bx.ndim > 0 and x_Bx.shape[0] % shards == 0


def rows_apart(x: Any) -> Any:
  """Activations, a tree of arrays (B, …), with their rows sharded over the mesh.

  Used between layers, since weights sharded along the same axis would otherwise
  tempt the compiler to gather the activations in their place. Without a mesh: x.
  """
  mesh = jax.sharding.get_abstract_mesh()

  def constrained(x):
    if not rows_come_out(mesh, x):
      return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *rest))

  return jax.tree.map(constrained, x)


def experts_apart(x_ExNxD: jax.Array) -> jax.Array:
  """Tokens of each expert, put where on the mesh its weights are.

  The batch is sharded along the experts' axis too, and the compiler is to gather tokens
  along it and not the experts, which are larger. Without such a mesh: x.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get("expert", 1) == 1:
    return x_ExNxD
  rows = tuple(name for name in ROWS if name != "expert")
  experts, tokens, _ = x_ExNxD.shape
  if experts % mesh.shape["expert"] or tokens % ways(mesh.shape, rows):
    return x_ExNxD
  spec = PartitionSpec("expert", rows, PartitionSpec.UNCONSTRAINED)
  return jax.lax.with_sharding_constraint(x_ExNxD, spec)
