"""Shardings of activations, given where the compiler would choose worse ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lorax_flax.devices import ROWS, TOKENS


def num_shards(sizes: Mapping[str, int], axes: Sequence[str] = ROWS) -> int:
  """Number of shards along these axes.

  Args:
    sizes: of a mesh's axes, by name.
  """
  return math.prod(sizes[name] for name in axes)


def can_shard_rows(mesh: Any, x_Bx: jax.Array) -> bool:
  """True where there is a mesh over which x can be sharded, as its rows allow."""
  if not {*ROWS, TOKENS} <= set(mesh.axis_names):
    return False
  apart = num_shards(mesh.shape, (*ROWS, TOKENS)) > 1
  return apart and x_Bx.ndim > 0 and x_Bx.shape[0] % num_shards(mesh.shape) == 0


def shard_rows(x: Any) -> Any:
  """Activations, a tree of arrays (B, …), with their rows sharded along the mesh.

  Given between layers, since weights that are sharded along the same axis would
  otherwise tempt the compiler to gather the activations instead. Without a mesh: x.
  """
  return jax.tree.map(lambda x: _shard(x, ROWS), x)


def shard_tokens(x: Any) -> Any:
  """Activations, a tree of arrays (B, T, …), as `shard_rows`, and their tokens too."""
  return jax.tree.map(lambda x: _shard(x, ROWS, (TOKENS,)), x)


def token_shards(length: int) -> int:
  """Number of shards of T tokens on the mesh of the context; 1 if they don't divide."""
  ways = jax.sharding.get_abstract_mesh().shape.get(TOKENS, 1)
  return ways if length % ways == 0 else 1


def _shard(x: jax.Array, *along: tuple[str, ...]) -> jax.Array:
  """x with its first axes sharded along these of the mesh, where it can be."""
  mesh, free = jax.sharding.get_abstract_mesh(), PartitionSpec.UNCONSTRAINED

  def spec(axes: tuple[str, ...], size: int) -> Any:
    if not set(axes) <= set(mesh.axis_names):
      return free
    ways = num_shards(mesh.shape, axes)
    return axes if ways > 1 and size % ways == 0 else free

  specs = [spec(axes, size) for axes, size in zip(along, x.shape, strict=False)]
  if all(spec is free for spec in specs):
    return x
  specs += [free] * (x.ndim - len(specs))
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*specs))


def gathered(weight: jax.Array, axis: int) -> jax.Array:
  """A weight that is not sharded along an axis, and a gradient that is not either.

  Given before a loop that multiplies by it each time: the compiler would gather it each
  time. Without a mesh: the weight.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = (*ROWS, TOKENS)
  if not set(axes) <= set(mesh.axis_names) or num_shards(mesh.shape, axes) == 1:
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
