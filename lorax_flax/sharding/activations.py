"""Shardings of activations, given where the compiler would choose worse ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lorax_flax.devices import ROWS


def num_shards(sizes: Mapping[str, int], axes: Sequence[str] = ROWS) -> int:
  """Number of shards along these axes.

  Args:
    sizes: of a mesh's axes, by name.
  """
  return math.prod(sizes[name] for name in axes)


def can_shard_rows(mesh: Any, x_Bx: jax.Array) -> bool:
  """True where there is a mesh along which the rows of x can be sharded."""
  if not set(ROWS) <= set(mesh.axis_names):
    return False
  apart = num_shards(mesh.shape)
  return apart > 1 and x_Bx.ndim > 0 and x_Bx.shape[0] % apart == 0


def shard_rows(x: Any) -> Any:
  """Activations, a tree of arrays (B, …), with their rows sharded along the mesh.

  Given between layers, since weights that are sharded along the same axis would
  otherwise tempt the compiler to gather the activations instead. Without a mesh: x.
  """
  mesh = jax.sharding.get_abstract_mesh()

  def cut(x):
    if not can_shard_rows(mesh, x):
      return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *rest))

  return jax.tree.map(cut, x)


def gathered(weight: jax.Array, axis: int) -> jax.Array:
  """A weight that is not sharded along an axis, and a gradient that is not either.

  Given before a loop that multiplies by it each time: the compiler would gather it each
  time. Without a mesh: the weight.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(ROWS) <= set(mesh.axis_names) or num_shards(mesh.shape) == 1:
    return weight
  spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * weight.ndim
  spec[axis] = None
  return jax.lax.with_sharding_constraint(weight, PartitionSpec(*spec))


def shard_experts(x_ExNxD: jax.Array) -> jax.Array:
  """Tokens of each expert, sharded as its weights are.

  The batch is sharded along the experts' axis too, and the compiler is to gather tokens
  along it and not the experts, which are larger. Without such a mesh: x.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get("expert", 1) == 1:
    return x_ExNxD
  rows = tuple(name for name in ROWS if name != "expert")
  experts, tokens, _ = x_ExNxD.shape
  if experts % mesh.shape["expert"] or tokens % num_shards(mesh.shape, rows):
    return x_ExNxD
  spec = PartitionSpec("expert", rows, PartitionSpec.UNCONSTRAINED)
  return jax.lax.with_sharding_constraint(x_ExNxD, spec)
