"""ViT with an image classifier.

An image is cut into patches, each a token; a learned token before them is read by the
head. Norms come before attention and MLP. Source: arXiv 2010.11929, as transformers
computes it (ViTForImageClassification).

Shapes: B batch, C channels, H and W pixels, T tokens (patches and one more), D
hidden_size, N heads, K head size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.models import hf_config as fields
from lorax_flax.models import layers, ops, vit_keys
from lorax_flax.models.family import Family
from lorax_flax.models.layers import DType
from lorax_flax.models.model import Model


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """ViT's shape, under Hugging Face's field names.

  Attributes:
    image_size, patch_size: in pixels, (height, width); one number stands for both.
    qkv_bias: whether query, key and value have a bias.
    num_labels: width of the classifier's output; 1 for regression.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  image_size: tuple[int, int] = (224, 224)
  patch_size: tuple[int, int] = (16, 16)
  num_channels: int = 3
  qkv_bias: bool = True
  hidden_act: str = "gelu"
  hidden_dropout_prob: float = 0.0
  attention_probs_dropout_prob: float = 0.0
  initializer_range: float = 0.02
  layer_norm_eps: float = 1e-12
  num_labels: int = 2

  def __post_init__(self):
    for name in ("image_size", "patch_size"):
      object.__setattr__(self, name, _pair(name, getattr(self, name)))
    fields.check_layers(self, ["num_hidden_layers"])
    sizes = ["hidden_size", "num_attention_heads", "intermediate_size", "num_channels"]
    fields.check_sizes(self, [*sizes, "num_labels"])
    rates = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    fields.check_rates(self, rates)
    fields.check_positive(self, ["initializer_range", "layer_norm_eps"])
    fields.check_flags(self, ["qkv_bias"])
    fields.check_multiple(self, "hidden_size", of="num_attention_heads")
    fields.check_activation(self, "hidden_act")
    if any(p > n for p, n in zip(self.patch_size, self.image_size, strict=True)):
      raise LoraxError(
        f"config: patch_size {self.patch_size} is larger than image_size "
        f"{self.image_size}"
      )

  @property
  def patches(self) -> int:
    """How many patches an image has; pixels left over at its ends are not seen."""
    (height, width), (high, wide) = self.image_size, self.patch_size
    return (height // high) * (width // wide)


def _pair(name: str, value: Any) -> tuple[int, int]:
  pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
  good = lambda pair: (
    len(pair) == 2 and all(type(n) is int and 1 <= n <= 2**16 for n in pair)
  )
  if not good(pair):
    says = "a number of pixels, or two: height and width"
    raise LoraxError(f"config: {name} must be {says}, not {value!r}")
  return pair


def from_hf(hf_config: Mapping[str, Any], **asked: Any) -> ViTConfig:
  """Reads a config.json that is already parsed; see `fields.read`."""
  return fields.read(ViTConfig, hf_config, only={"head_dim": None}, **asked)


def _dense(
  config: ViTConfig, features: int, axes, dtype, name: str, *, bias: bool = True
) -> nn.Dense:
  std = config.initializer_range
  return layers.dense(features, axes, dtype, name, std=std, bias=bias)


class Attention(nn.Module):
  """Self-attention of every token to every token."""

  config: ViTConfig
  dtype: DType
  deterministic: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c, bias = self.config, self.config.qkv_bias
    axes = ("embed", "heads")
    q_BxTxNxK, k_BxTxNxK, v_BxTxNxK = (
      layers.in_heads(
        _dense(c, c.hidden_size, axes, self.dtype, name, bias=bias)(x_BxTxD),
        c.num_attention_heads,
      )
      for name in ("q_proj", "k_proj", "v_proj")
    )
    rate = c.attention_probs_dropout_prob
    y_BxTxNxK = ops.attention(
      q_BxTxNxK,
      k_BxTxNxK,
      v_BxTxNxK,
      jnp.ones(x_BxTxD.shape[:2], jnp.int32),
      dropout_rate=rate,
      dropout_rng=layers.dropout_rng(self, rate, self.deterministic),
    )
    y_BxTxD = y_BxTxNxK.reshape(x_BxTxD.shape)
    return _dense(c, c.hidden_size, axes[::-1], self.dtype, "o_proj")(y_BxTxD)


class MLP(nn.Module):
  """Two dense layers."""

  config: ViTConfig
  dtype: DType

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c = self.config
    up = _dense(c, c.intermediate_size, ("embed", "mlp"), self.dtype, "fc1")
    down = _dense(c, c.hidden_size, ("mlp", "embed"), self.dtype, "fc2")
    return down(ops.activation(c.hidden_act)(up(x_BxTxD)))


class Layer(nn.Module):
  """One layer, in the form that nn.scan asks for."""

  config: ViTConfig
  dtype: DType
  deterministic: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array):
    c, made_with = self.config, (self.config, self.dtype)
    drop = nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)
    y_BxTxD = layers.Norm(c.layer_norm_eps, name="layernorm_before")(x_BxTxD)
    y_BxTxD = Attention(*made_with, self.deterministic, name="attention")(y_BxTxD)
    x_BxTxD += drop(y_BxTxD)
    y_BxTxD = layers.Norm(c.layer_norm_eps, name="layernorm_after")(x_BxTxD)
    return x_BxTxD + drop(MLP(*made_with, name="mlp")(y_BxTxD)), None


class Embeddings(nn.Module):
  """Patches projected, after the token that the head reads; positions added."""

  config: ViTConfig
  dtype: DType
  deterministic: bool

  @nn.compact
  def __call__(self, pixels_BxCxHxW: jax.Array) -> jax.Array:
    c, normal = self.config, nn.initializers.normal(self.config.initializer_range)

    def param(name, length):
      init = nn.with_logical_partitioning(normal, ("single", "positions", "embed"))
      x: Any = self.param(name, init, (1, length, c.hidden_size))
      return x.astype(self.dtype)

    project = nn.Conv(
      c.hidden_size,
      c.patch_size,
      strides=c.patch_size,
      padding="VALID",
      dtype=self.dtype,
      kernel_init=nn.with_logical_partitioning(
        normal, ("height", "width", "channels", "embed")
      ),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",)),
      name="projection",
    )
    x_BxTxD = project(pixels_BxCxHxW.transpose(0, 2, 3, 1))
    x_BxTxD = x_BxTxD.reshape(x_BxTxD.shape[0], c.patches, c.hidden_size)
    first_Bx1xD = jnp.broadcast_to(
      param("cls_token", 1), (x_BxTxD.shape[0], 1, c.hidden_size)
    )
    x_BxTxD = jnp.concatenate([first_Bx1xD, x_BxTxD], axis=1)
    x_BxTxD += param("position_embeddings", c.patches + 1)
    return nn.Dropout(c.hidden_dropout_prob)(x_BxTxD, self.deterministic)


class ImageClassifier(Model):
  """An encoder with a head over its first token; one output is a regression."""

  config: ViTConfig

  @nn.compact
  def __call__(
    self, pixel_values: jax.Array, *, deterministic: bool = True
  ) -> jax.Array:
    """Logits, batch x num_labels, float32.

    Args:
      pixel_values: BxCxHxW floats, normalised as the checkpoint's preprocessor says.
      deterministic: without dropout; otherwise a "dropout" rng is needed.

    Raises:
      LoraxError: images of another size than the model's.
    """
    c, dtype = self.config, self.dtype
    if (shape := pixel_values.shape[1:]) != (want := (c.num_channels, *c.image_size)):
      raise LoraxError(
        f"images of shape {shape}: the model takes {want}, channels first"
      )
    x_BxTxD = Embeddings(c, dtype, deterministic, name="embeddings")(pixel_values)
    x_BxTxD = layers.stack(
      Layer,
      (c, dtype, deterministic),
      c.num_hidden_layers,
      x_BxTxD,
      scan=self.scan,
      remat=self.remat,
    )
    x_BxD = layers.Norm(c.layer_norm_eps, name="layernorm")(layers.first_token(x_BxTxD))
    head = _dense(c, c.num_labels, ("embed", "labels"), dtype, "classifier")
    return head(x_BxD).astype(jnp.float32)


def inputs(config: ViTConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """The smallest inputs; see `Family.inputs`."""
  shape = (1, config.num_channels, *config.image_size)
  return {"pixel_values": jax.ShapeDtypeStruct(shape, jnp.float32)}


FAMILIES = {
  "vit": Family(
    task="image-classification",
    architecture="ViTForImageClassification",
    configure=from_hf,
    build=ImageClassifier,
    keymap=lambda config, scan: vit_keys.keymap(
      config.num_hidden_layers, config.qkv_bias, scan
    ),
    inputs=inputs,
    max_length=lambda config: 0,
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
  )
}
