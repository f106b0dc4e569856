"""ViT with an image classifier.

An image is split into patches, each a token; the head reads a learned token before
them. Norms come before attention and MLP. Source: arXiv 2010.11929, as transformers
computes it (ViTForImageClassification).

Shapes: B batch, C channels, H and W pixels, T tokens (the patches and one), D
hidden_size.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.hub.checkpoints.entries import (
  CONV_2D,
  Entry,
  each,
  linear,
  norm,
  weight_and_bias,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.models import hf_config as fields
from lorax_flax.models import layers, stacking
from lorax_flax.models.family import Family
from lorax_flax.models.layers import Model, Part


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """ViT's shape, under Hugging Face's field names.

  Attributes:
    image_size, patch_size: in pixels, (height, width); one number is taken for both.
    qkv_bias: whether query, key and value have a bias.
    num_labels: width of the classifier's output; 1 for regression.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  hidden_size: fields.Size = 768
  num_hidden_layers: fields.Layers = 12
  num_attention_heads: fields.Size = 12
  intermediate_size: fields.Size = 3072
  image_size: tuple[int, int] = (224, 224)
  patch_size: tuple[int, int] = (16, 16)
  num_channels: fields.Size = 3
  qkv_bias: bool = True
  hidden_act: fields.Activation = "gelu"
  hidden_dropout_prob: fields.Rate = 0.0
  attention_probs_dropout_prob: fields.Rate = 0.0
  initializer_range: fields.Positive = 0.02
  layer_norm_eps: fields.Positive = 1e-12
  num_labels: fields.Size = 2

  def __post_init__(self):
    for name in ("image_size", "patch_size"):
      object.__setattr__(self, name, _pair(name, getattr(self, name)))
    fields.check_fields(self)
    fields.check_multiple(self, "hidden_size", of="num_attention_heads")
    if any(p > n for p, n in zip(self.patch_size, self.image_size, strict=True)):
      raise LoraxError(
        f"config: patch_size {self.patch_size} is larger than image_size "
        f"{self.image_size}"
      )

  @property
  def patches(self) -> int:
    """The number of patches of an image; pixels left over at its ends are ignored."""
    (height, width), (high, wide) = self.image_size, self.patch_size
    return (height // high) * (width // wide)


def _pair(name: str, value: Any) -> tuple[int, int]:
  pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
  good = lambda pair: (
    len(pair) == 2 and all(type(n) is int and 1 <= n <= 2**16 for n in pair)
  )
  if not good(pair):
    expected = "a number of pixels, or two: height and width"
    raise LoraxError(f"config: {name} must be {expected}, not {value!r}")
  return pair


class Attention(Part[ViTConfig]):
  """Self-attention of every token to every token."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c, bias = self.config, self.config.qkv_bias
    axes = ("embed", "heads")
    qkv_BxTxD = [
      self.dense(c.hidden_size, axes, name, bias=bias)(x_BxTxD)
      for name in ("q_proj", "k_proj", "v_proj")
    ]
    mask_BxT = jnp.ones(x_BxTxD.shape[:2], jnp.int32)
    heads, rate = c.num_attention_heads, c.attention_probs_dropout_prob
    y_BxTxD = layers.attend(self, qkv_BxTxD, mask_BxT, heads, rate)
    return self.dense(c.hidden_size, ("heads", "embed"), "o_proj")(y_BxTxD)


class Layer(Part[ViTConfig]):
  """One layer, in the form of nn.scan."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array):
    c, args = self.config, (self.config, self.dtype, self.deterministic)
    drop = nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)
    y_BxTxD = layers.Norm(c.layer_norm_eps, name="layernorm_before")(x_BxTxD)
    x_BxTxD += drop(Attention(*args, name="attention")(y_BxTxD))
    y_BxTxD = layers.Norm(c.layer_norm_eps, name="layernorm_after")(x_BxTxD)
    feed = layers.MLP(
      *args, ("fc1", "fc2"), c.intermediate_size, c.hidden_act, 0.0, name="mlp"
    )
    return x_BxTxD + drop(feed(y_BxTxD)), None


class Embeddings(Part[ViTConfig]):
  """The learned token and the projected patches, with positions added."""

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


class ImageClassifier(Model[ViTConfig]):
  """An encoder with a head over its first token; one output is a regression."""

  @nn.compact
  def __call__(
    self, pixel_values: jax.Array, *, deterministic: bool = True
  ) -> jax.Array:
    """Logits, batch x num_labels, float32.

    Args:
      pixel_values: BxCxHxW floats, normalised by the checkpoint's preprocessor config.
      deterministic: without dropout; otherwise a "dropout" rng is needed.

    Raises:
      LoraxError: images of another size than the model's.
    """
    c, args = self.config, (self.config, self.dtype, deterministic)
    shape, expected = pixel_values.shape[1:], (c.num_channels, *c.image_size)
    if shape != expected:
      raise LoraxError(
        f"images of shape {shape}: the model takes {expected}, channels first"
      )
    x_BxTxD = Embeddings(*args, name="embeddings")(pixel_values)
    x_BxTxD, _ = stacking.stack(self, Layer, args, c.num_hidden_layers, x_BxTxD)
    x_BxD = layers.Norm(c.layer_norm_eps, name="layernorm")(layers.first_token(x_BxTxD))
    head = self.dense(c.num_labels, ("embed", "labels"), "classifier")
    return head(x_BxD).astype(jnp.float32)


def inputs(config: ViTConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """The smallest inputs; see `Family.inputs`."""
  shape = (1, config.num_channels, *config.image_size)
  return {"pixel_values": jax.ShapeDtypeStruct(shape, jnp.float32)}


# Names in a checkpoint

_LAYER = "layer_{i}"
_KEY = "layers.{i}"

# Each layer's linear modules: the name in transformers and PEFT, to that in files.
_LINEAR = {
  "attention.q_proj": "attention.attention.query",
  "attention.k_proj": "attention.attention.key",
  "attention.v_proj": "attention.attention.value",
  "attention.o_proj": "attention.output.dense",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_NORMS = ("layernorm_before", "layernorm_after")
_ON_DISK = _LINEAR | {name: name for name in _NORMS}

# The encoder's pooler; pretraining's head for masked patches.
_OTHER = (
  "embeddings.mask_token",
  *weight_and_bias("pooler.dense", "decoder.0"),
)


def _entries(qkv_bias: bool) -> tuple[Entry, ...]:
  projection = "embeddings.patch_embeddings.projection"
  biased = {name: qkv_bias or not name.endswith(_QKV) for name in _LINEAR}
  return (
    Entry("embeddings/cls_token", "embeddings.cls_token"),
    Entry("embeddings/position_embeddings", "embeddings.position_embeddings"),
    Entry("embeddings/projection/kernel", f"{projection}.weight", CONV_2D),
    Entry("embeddings/projection/bias", f"{projection}.bias"),
    *(
      entry
      for name, has_bias in biased.items()
      for entry in linear(
        f"{_LAYER}/{name.replace('.', '/')}", f"{_KEY}.{name}", bias=has_bias
      )
    ),
    *each(norm, _LAYER, _KEY, _NORMS),
    *norm("layernorm", "layernorm"),
    *linear("classifier", "classifier", part="head", labels=True),
  )


def keymap(c: ViTConfig, scan: bool) -> KeyMap:
  """The key map of a ViT; with `qkv_bias`, query, key and value have biases."""
  return KeyMap(
    family="vit",
    prefix="vit.",
    entries=_entries(c.qkv_bias),
    counts={"i": c.num_hidden_layers},
    scan=scan,
    anchor="embeddings.cls_token",
    other_heads=_OTHER,
    head_groups=("classifier",),
    on_disk={
      f"{_KEY}.{module}": f"encoder.layer.{{i}}.{old}"
      for module, old in _ON_DISK.items()
    },
  )


FAMILIES = {
  "vit": Family(
    task="image-classification",
    architecture="ViTForImageClassification",
    configure=partial(fields.read, ViTConfig, only={"head_dim": None}),
    build=ImageClassifier,
    keymap=keymap,
    inputs=inputs,
    max_length=lambda config: 0,
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
  )
}
