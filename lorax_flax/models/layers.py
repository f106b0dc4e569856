"""What every family's modules are made of; kernels are (in, out), their axes named."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import PartitionSpec

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.models import ops
from lorax_flax.sharding import activations as spread

DType = Any

# What nn.remat keeps for the backward pass.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  # Products with kernels are kept, attention's and the element-wise rest recomputed.
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(remat: str) -> None:
  """Raises LoraxError unless `remat` is "none" or a policy."""
  if remat != "none" and remat not in REMAT_POLICIES:
    raise LoraxError(unknown("remat", remat, ["none", *REMAT_POLICIES]))


def dense(
  features: int,
  axes: tuple[str, str],
  dtype: DType,
  name: str | None = None,
  *,
  std: float = 0.02,
  bias: bool = True,
) -> nn.Dense:
  """A dense layer.

  Args:
    axes: logical names of the kernel's two axes.
    dtype: of computing.
    std: of the normal that a fresh kernel is drawn from.
  """
  return nn.Dense(
    features,
    use_bias=bias,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(nn.initializers.normal(std), axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
    name=name,
  )


class Embed(nn.Embed):
  """A table, of which what is looked up lies as activations do on a mesh.

  Attributes:
    along: logical name of the features.
  """

  along: str = "embed"

  def __call__(self, ids_BxT: jax.Array) -> jax.Array:
    """BxTxD."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = self.along == "embed" and ids_BxT.ndim == 2
    rows = rows and spread.can_shard_rows(mesh, ids_BxT)
    if rows and self.features % mesh.shape["fsdp"] == 0:
      # Each device looks up its own columns for the rows of all that share the table,
      # which then change places, and only then are cut along what else there is. Left
      # alone, the compiler copies all rows everywhere.
      cut, free = jax.lax.with_sharding_constraint, PartitionSpec.UNCONSTRAINED
      ids_BxT = cut(ids_BxT, PartitionSpec("data", free))
      x_BxTxD = cut(super().__call__(ids_BxT), PartitionSpec("data", free, "fsdp"))
      x_BxTxD = cut(x_BxTxD, PartitionSpec(("data", "fsdp"), free, free))
      return spread.shard_rows(x_BxTxD)
    return super().__call__(ids_BxT)


def embed(
  rows: int,
  features: int,
  name: str | None = None,
  *,
  axis: str,
  along: str = "embed",
  std: float = 0.02,
) -> nn.Embed:
  """A table, one vector a row; cast what is looked up, for a dtype casts the table.

  Args:
    axis, along: logical names of the rows and of the features.
    std: of the normal that a fresh table is drawn from.
  """
  init = nn.with_logical_partitioning(nn.initializers.normal(std), (axis, along))
  return Embed(rows, features, embedding_init=init, name=name, along=along)


def logits(x_BxTxD: jax.Array, table: nn.Embed) -> jax.Array:
  """Scores of every row of a table, BxTxV float32: a head tied to its embeddings."""
  table_VxD = table.embedding.astype(x_BxTxD.dtype)
  return jnp.einsum("BTD,VD->BTV", x_BxTxD, table_VxD).astype(jnp.float32)


class Norm(nn.Module):
  """Layer norm over the features."""

  eps: float

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    scale_D, bias_D = _norm_weights(self, x_BxTxD.shape[-1])
    return ops.layer_norm(x_BxTxD, scale_D, bias_D, self.eps)


class RmsNorm(nn.Module):
  """RMS norm over the last axis; see `ops.rms_norm`.

  Attributes:
    axis: the logical name of the last axis.
  """

  eps: float
  offset: float = 0.0
  late: bool = False
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    start = nn.initializers.constant(1.0 - self.offset)
    init = nn.with_logical_partitioning(start, (self.axis,))
    scale_D = self.param("scale", init, (x.shape[-1],))
    return ops.rms_norm(x, scale_D, self.eps, self.offset, self.late)


class NormWeights(nn.Module):
  """The scale and the bias, D each, of a layer norm that is computed elsewhere."""

  @nn.compact
  def __call__(self, features: int) -> tuple[jax.Array, jax.Array]:
    return _norm_weights(self, features)


def _norm_weights(module: nn.Module, features: int) -> tuple[jax.Array, jax.Array]:
  def param(name, init):
    init = nn.with_logical_partitioning(init, ("embed",))
    return module.param(name, init, (features,))

  scale_D = param("scale", nn.initializers.ones_init())
  return scale_D, param("bias", nn.initializers.zeros_init())


def in_heads(x_BxTxD: jax.Array, heads: int) -> jax.Array:
  """Splits the features into heads: BxTxHxK."""
  return x_BxTxD.reshape((*x_BxTxD.shape[:-1], heads, -1))


def first_token(x_BxTxD: jax.Array) -> jax.Array:
  """Activations of each row's first token, BxD, which a classifier reads.

  Rows stay sharded as in the layers: else the gradient comes back sharded along the
  features, and the compiler replicates it to get from there to rows.
  """
  return spread.shard_rows(x_BxTxD[:, 0])


def dropout_rng(
  module: nn.Module, rate: float, deterministic: bool
) -> jax.Array | None:
  """A key for `ops.attention`, or None where nothing is dropped."""
  return None if deterministic or rate == 0.0 else module.make_rng("dropout")


def stack(
  layer: Any,
  args: Sequence[Any],
  count: int,
  x: Any,
  *shared: Any,
  scan: bool,
  remat: str,
  each: Mapping[str, jax.Array | np.ndarray] | None = None,
) -> Any:
  """Runs x through `count` layers; to be called from a compact method.

  The parameters are "layer_{i}/…" of each layer, or with `scan` one stacked tree under
  "layers", whose leading axis has the logical name "layers".

  Args:
    layer: a module class whose call takes (x, *shared), and `each` by name where it is
      given, and returns (x, None).
    args: that its instances are made with.
    x: the carry: an array or a tree of them.
    shared: what every layer takes as it is.
    scan, remat: see REMAT_POLICIES.
    each: arrays (count, …) of which each layer takes its own row.
  """
  each = dict(each or {})
  x = spread.shard_rows(x)
  if remat != "none":
    policy = REMAT_POLICIES[remat]
    layer = nn.remat(layer, policy=policy, prevent_cse=not scan)
  if not scan:
    for i in range(count):
      own = {name: rows[i] for name, rows in each.items()}
      x, _ = layer(*args, name=f"layer_{i}")(x, *shared, **own)
      x = spread.shard_rows(x)
    return x

  def body(module, x, own, *shared):
    x, out = module(x, *shared, **own)
    return spread.shard_rows(x), out

  run = nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(0, *(nn.broadcast for _ in shared)),
    length=count,
    metadata_params={meta.PARTITION_NAME: "layers"},
  )
  own = {name: jnp.asarray(rows) for name, rows in each.items()}
  return run(layer(*args, name="layers"), x, own, *shared)[0]
