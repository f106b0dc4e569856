"""Shardings of activations, given where the compiler would choose worse ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
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


def on_experts(
  run: Callable[..., jax.Array], experts: int, features: int, rows: int
) -> Callable[..., jax.Array]:
  """`run` on the experts of each device and the tokens of all along their axis.

  Tokens are gathered along the mesh's axis of experts and not the experts, which are
  larger, and the results summed back to the tokens' own devices.

  Args:
    run: of (the number of the first expert, x NxD, weights NxC, chosen NxC, up
      ExDx2xM, down ExMxD), to the sums over these experts and features, NxD.
    experts, features: E and M, of the full model.
    rows: B.

  Returns:
    A function of (x BxTxD, weights BxTxC, chosen BxTxC, up, down) to BxTxD.
  """

  def flat(first: Any, operands: Sequence[jax.Array]) -> jax.Array:
    *tokens, up, down = operands
    rows = (t.reshape(-1, t.shape[-1]) for t in tokens)
    return run(first, *rows, up, down).reshape(tokens[0].shape)

  mesh = jax.sharding.get_abstract_mesh()
  if not {*ROWS, "tensor"} <= set(mesh.axis_names) or mesh.size == 1:
    return lambda *operands: flat(0, operands)
  sizes = mesh.shape
  has_rows = rows % num_shards(sizes) == 0
  across = "expert" if experts % sizes["expert"] == 0 and sizes["expert"] > 1 else None
  inside = "tensor" if features % sizes["tensor"] == 0 and sizes["tensor"] > 1 else None

  def shard(*operands: jax.Array) -> jax.Array:
    *tokens, up, down = operands
    first: Any = 0
    if across is not None:
      first = lax.axis_index(across) * up.shape[0]
      if has_rows:
        tokens = [lax.all_gather(t, across, axis=0, tiled=True) for t in tokens]
    y = flat(first, [*tokens, up, down])
    if inside is not None:
      y = lax.psum(y, inside)
    if across is None:
      return y
    if has_rows:
      return lax.psum_scatter(y, across, scatter_dimension=0, tiled=True)
    return lax.psum(y, across)

  tokens = PartitionSpec(ROWS if has_rows else None)
  kernels = PartitionSpec(across, None, None, inside), PartitionSpec(across, inside)
  sharded = jax.shard_map(
    shard, in_specs=(tokens,) * 3 + kernels, out_specs=tokens, check_vma=False
  )

  def placed(*operands: jax.Array) -> jax.Array:
    *rest, up, down = operands
    # First along tensor alone: in one step the compiler would gather all experts.
    embed = "fsdp" if up.shape[1] % sizes["fsdp"] == 0 else None
    spec = PartitionSpec(across, embed, None, inside)
    return sharded(*rest, lax.with_sharding_constraint(up, spec), down)

  return placed
