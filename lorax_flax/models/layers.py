"""Modules and functions that families share; kernels are (in, out), with named axes."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lorax_flax.errors import LoraxError
from lorax_flax.models import ops
from lorax_flax.models.cache import Chunk, KeyValues
from lorax_flax.models.cache import attend as attend_cached
from lorax_flax.models.given import Given
from lorax_flax.sharding import activations as spread

DType = Any
# The number, in a mask, of keys that every segment attends to.
EVERY_SEGMENT = -1
Config = TypeVar("Config")


class Module(Given, Generic[Config]):
  """A module of a family, whose fresh weights have its config's standard deviation.

  Attributes:
    config: the family's own; see `lorax_flax.models.family.Family`.
    dtype: of computation; norms, softmax and logits are float32.
  """

  config: Config
  dtype: DType

  @nn.nowrap
  def dense(
    self, features: int, axes: tuple[str, str], name: str, bias: bool = True
  ) -> nn.Dense:
    """A dense layer; see `dense`."""
    config: Any = self.config
    std = config.initializer_range
    return dense(features, axes, self.dtype, name, std=std, bias=bias)

  @nn.nowrap
  def table(self, rows: int, features: int, name: str, axis: str) -> nn.Embed:
    """An embedding table; see `embed`."""
    config: Any = self.config
    return embed(rows, features, name, axis=axis, std=config.initializer_range)


class Model(Module[Config]):
  """A full model; a family's own is called with its inputs by name.

  Attributes:
    scan: the layers are stacked under "…/layers" and scanned.
    remat: what the backward pass recomputes: one of `models.remat.REMAT`.
  """

  dtype: DType = jnp.float32
  scan: bool = False
  remat: str = "none"


class Part(Module[Config]):
  """A part of a model with dropout, which `deterministic` leaves out."""

  deterministic: bool


class TextClassifier(Model[Config]):
  """An encoder with a head over its first token; one output is a regression."""

  def __call__(
    self,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    token_type_ids: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    """Logits, BxC float32.

    Args:
      input_ids, attention_mask, token_type_ids: BxT int32; the mask is 1 where a token
        is attended to; the types are zeros by default.
      deterministic: without dropout; otherwise a "dropout" rng is needed.
    """
    if token_type_ids is None:
      token_type_ids = jnp.zeros_like(input_ids)
    y_BxC = self.logits(input_ids, attention_mask, token_type_ids, deterministic)
    return y_BxC.astype(jnp.float32)

  def logits(self, input_ids, attention_mask, token_type_ids, deterministic):
    """Logits, BxC, of a family's own layers; compact."""
    raise NotImplementedError


def check_length(input_ids_BxT: jax.Array, most: int) -> None:
  """Raises LoraxError for texts with more tokens than the model has positions."""
  if (length := input_ids_BxT.shape[1]) > most:
    raise LoraxError(f"a text of {length} tokens: the model takes at most {most}")


class Dense(Given, nn.Dense):
  """A dense layer whose result a remat policy can keep; see `models.remat`.

  Attributes:
    axis: logical name of the features of its result, and the name of that value.
  """

  axis: str = ""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return checkpoint_name(super().__call__(x), self.axis)


def dense(
  features: int,
  axes: tuple[str, str],
  dtype: DType,
  name: str | None = None,
  *,
  std: float = 0.02,
  bias: bool = True,
) -> Dense:
  """A dense layer.

  Args:
    axes: logical names of the kernel's two axes.
    dtype: of computation.
    std: standard deviation of a fresh kernel.
  """
  return Dense(
    features,
    axis=axes[1],
    use_bias=bias,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(nn.initializers.normal(std), axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
    name=name,
  )


class Embed(Given, nn.Embed):
  """An embedding table, whose rows are sharded like activations after the look-up.

  Attributes:
    along: logical name of the features.
  """

  along: str = "embed"

  def __call__(self, ids_BxT: jax.Array) -> jax.Array:
    """BxTxD."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = self.along == "embed" and ids_BxT.ndim == 2
    rows = rows and spread.can_shard_rows(mesh, ids_BxT)
    columns = ("fsdp", spread.TOKENS)
    if rows and self.features % spread.num_shards(mesh.shape, columns) == 0:
      # Each device looks up its own columns for the tokens of all devices that share
      # the table; then an all-to-all exchanges them, and only then are they sharded
      # along the other axes. By itself the compiler would all-gather every row.
      constrain, free = jax.lax.with_sharding_constraint, PartitionSpec.UNCONSTRAINED
      tokens = spread.TOKENS if spread.token_shards(ids_BxT.shape[1]) > 1 else free
      ids_BxT = constrain(ids_BxT, PartitionSpec("data", free))
      x_BxTxD = constrain(
        super().__call__(ids_BxT), PartitionSpec("data", free, columns)
      )
      x_BxTxD = constrain(x_BxTxD, PartitionSpec("data", tokens, "fsdp"))
      x_BxTxD = constrain(x_BxTxD, PartitionSpec(("data", "fsdp"), tokens, free))
      return spread.shard_tokens(x_BxTxD)
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
  """An embedding table, one vector a row.

  Cast the rows that are looked up: an nn.Embed with a dtype would cast the full table.

  Args:
    axis, along: logical names of the rows and of the features.
    std: standard deviation of a fresh table.
  """
  init = nn.with_logical_partitioning(nn.initializers.normal(std), (axis, along))
  return Embed(rows, features, embedding_init=init, name=name, along=along)


class MLP(Part[Any]):
  """Two dense layers with an activation between, and dropout behind.

  Attributes:
    names: the two layers', in and out.
    features: between the two.
    activation: its name, see `ops.activation`.
    rate: of the dropout.
  """

  names: tuple[str, str]
  features: int
  activation: str
  rate: float

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    up = self.dense(self.features, ("embed", "mlp"), self.names[0])
    down = self.dense(x_BxTxD.shape[-1], ("mlp", "embed"), self.names[1])
    y_BxTxD = down(ops.activation(self.activation)(up(x_BxTxD)))
    return nn.Dropout(self.rate)(y_BxTxD, self.deterministic)


class Norm(Given):
  """Layer norm over the features."""

  eps: float

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    scale_D, bias_D = _norm_weights(self, x_BxTxD.shape[-1])
    return ops.layer_norm(x_BxTxD, scale_D, bias_D, self.eps)


class RmsNorm(Given):
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


class NormWeights(Given):
  """The scale and the bias, (D,) each, of a layer norm that is computed elsewhere."""

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
  """A key for `ops.attention`, or None without dropout."""
  return None if deterministic or rate == 0.0 else module.make_rng("dropout")


def attend(
  module: Any,
  qkv_BxTxD: Sequence[jax.Array],
  mask_BxT: jax.Array,
  heads: int,
  rate: float,
  prefix: KeyValues | None = None,
  **options: Any,
) -> jax.Array:
  """Self-attention of projected features, BxTxD; to be called from a compact method.

  Args:
    module: the caller; its `deterministic` decides dropout.
    qkv_BxTxD: queries, keys and values.
    mask_BxT: nonzero where a token is attended to.
    rate: of the dropout of attention's weights.
    prefix: keys and values before the tokens', PxHxK each.
    **options: of `ops.attention`.
  """
  q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (in_heads(x, heads) for x in qkv_BxTxD)
  y_BxTxHxK = ops.attention(
    q_BxTxHxK,
    *_behind(prefix, k_BxTxHxK, v_BxTxHxK, mask_BxT),
    dropout_rate=rate,
    dropout_rng=dropout_rng(module, rate, module.deterministic),
    shared=getattr(module.config, "soft", None) is not None,
    **options,
  )
  return y_BxTxHxK.reshape(qkv_BxTxD[0].shape)


def attend_before(
  module: Any,
  q_BxTxHxK: jax.Array,
  k_BxTxGxK: jax.Array,
  v_BxTxGxK: jax.Array,
  tokens: jax.Array | Chunk,
  kept: KeyValues | None,
  rate: float,
  **options: Any,
) -> tuple[jax.Array, KeyValues | None]:
  """Causal self-attention, BxTxHxK, and what a cache keeps of it; of a compact method.

  Args:
    module: the caller; its `deterministic` decides dropout.
    tokens: the mask BxT of `ops.attention`, or with a cache the places of the tokens.
    kept: the layer's part of the cache; without one, its prefix, PxGxK each, or None.
    rate: of the dropout of attention's weights.
    **options: window, scale and softcap of `ops.attention`.
  """
  if isinstance(tokens, Chunk):
    assert kept is not None  # There is one where there is the other.
    return attend_cached(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, kept, tokens, **options)
  y_BxTxHxK = ops.attention(
    q_BxTxHxK,
    *_behind(kept, k_BxTxGxK, v_BxTxGxK, tokens),
    causal=True,
    dropout_rate=rate,
    dropout_rng=dropout_rng(module, rate, module.deterministic),
    shared=getattr(module.config, "soft", None) is not None,
    **options,
  )
  return y_BxTxHxK, None


def _behind(
  prefix: KeyValues | None, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array, mask_BxT: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Keys, values and mask with those of a prefix before them."""
  if prefix is None:
    return k_BxTxGxK, v_BxTxGxK, mask_BxT

  def joined(own_PxGxK, x_BxTxGxK):
    shape = (len(x_BxTxGxK), *own_PxGxK.shape)
    own = jnp.broadcast_to(own_PxGxK.astype(x_BxTxGxK.dtype)[None], shape)
    return jnp.concatenate([own, x_BxTxGxK], axis=1)

  seen_BxP = jnp.full((len(mask_BxT), len(prefix[0])), EVERY_SEGMENT, mask_BxT.dtype)
  mask_BxS = jnp.concatenate([seen_BxP, mask_BxT], axis=1)
  return joined(prefix[0], k_BxTxGxK), joined(prefix[1], v_BxTxGxK), mask_BxS
