"""DistilBERT with a sequence classifier.

BERT's encoder without token types or a pooler, and with fewer dropouts. Source: arXiv
1910.01108, as transformers computes it (DistilBertForSequenceClassification).

Shapes: B batch, T tokens, D dim, H heads, K head size, C labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.models import distilbert_keys, layers, ops
from lorax_flax.models import hf_config as fields
from lorax_flax.models.family import Family, text_inputs
from lorax_flax.models.layers import DType
from lorax_flax.models.model import Model, check_length

_EPS = 1e-12  # Of every norm; config.json does not say.


@dataclasses.dataclass(frozen=True)
class DistilBertConfig:
  """DistilBERT's shape, under Hugging Face's field names.

  Attributes:
    num_labels: width of the classifier's output; 1 for regression.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  vocab_size: int = 30522
  dim: int = 768
  n_layers: int = 6
  n_heads: int = 12
  hidden_dim: int = 3072
  max_position_embeddings: int = 512
  activation: str = "gelu"
  dropout: float = 0.1
  attention_dropout: float = 0.1
  seq_classif_dropout: float = 0.2
  initializer_range: float = 0.02
  num_labels: int = 2

  def __post_init__(self):
    sizes = ["vocab_size", "dim", "n_heads", "hidden_dim", "num_labels"]
    fields.check_layers(self, ["n_layers"])
    fields.check_sizes(self, [*sizes, "max_position_embeddings"])
    rates = ["dropout", "attention_dropout", "seq_classif_dropout"]
    fields.check_rates(self, rates)
    fields.check_positive(self, ["initializer_range"])
    fields.check_multiple(self, "dim", of="n_heads")
    fields.check_activation(self, "activation")


_ALIASES = {
  "hidden_size": "dim",
  "num_attention_heads": "n_heads",
  "num_hidden_layers": "n_layers",
}


def from_hf(hf_config: Mapping[str, Any], **asked: Any) -> DistilBertConfig:
  """Reads a config.json that is already parsed; see `fields.read`."""
  return fields.read(DistilBertConfig, hf_config, aliases=_ALIASES, **asked)


def _dense(config: DistilBertConfig, features: int, axes, dtype, name: str) -> nn.Dense:
  return layers.dense(features, axes, dtype, name, std=config.initializer_range)


class Attention(nn.Module):
  """Self-attention."""

  config: DistilBertConfig
  dtype: DType
  deterministic: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    c = self.config
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (
      layers.in_heads(
        _dense(c, c.dim, ("embed", "heads"), self.dtype, name)(x_BxTxD), c.n_heads
      )
      for name in ("q_lin", "k_lin", "v_lin")
    )
    y_BxTxHxK = ops.attention(
      q_BxTxHxK,
      k_BxTxHxK,
      v_BxTxHxK,
      mask_BxT,
      dropout_rate=c.attention_dropout,
      dropout_rng=layers.dropout_rng(self, c.attention_dropout, self.deterministic),
    )
    y_BxTxD = y_BxTxHxK.reshape(x_BxTxD.shape)
    return _dense(c, c.dim, ("heads", "embed"), self.dtype, "out_lin")(y_BxTxD)


class FeedForward(nn.Module):
  """Two dense layers."""

  config: DistilBertConfig
  dtype: DType
  deterministic: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c = self.config
    up = _dense(c, c.hidden_dim, ("embed", "mlp"), self.dtype, "lin1")
    down = _dense(c, c.dim, ("mlp", "embed"), self.dtype, "lin2")
    y_BxTxD = down(ops.activation(c.activation)(up(x_BxTxD)))
    return nn.Dropout(c.dropout)(y_BxTxD, self.deterministic)


class Layer(nn.Module):
  """One layer, in the form that nn.scan asks for."""

  config: DistilBertConfig
  dtype: DType
  deterministic: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array):
    made_with = (self.config, self.dtype, self.deterministic)
    y_BxTxD = Attention(*made_with, name="attention")(x_BxTxD, mask_BxT)
    x_BxTxD = layers.Norm(_EPS, name="sa_layer_norm")(x_BxTxD + y_BxTxD)
    y_BxTxD = FeedForward(*made_with, name="ffn")(x_BxTxD)
    return layers.Norm(_EPS, name="output_layer_norm")(x_BxTxD + y_BxTxD), None


class Transformer(nn.Module):
  """All layers, one after another or stacked and scanned."""

  config: DistilBertConfig
  dtype: DType
  scan: bool
  remat: str
  deterministic: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    return layers.stack(
      Layer,
      (self.config, self.dtype, self.deterministic),
      self.config.n_layers,
      x_BxTxD,
      mask_BxT,
      scan=self.scan,
      remat=self.remat,
    )


class Embeddings(nn.Module):
  """Token and position embeddings, summed and normed."""

  config: DistilBertConfig
  dtype: DType
  deterministic: bool

  @nn.compact
  def __call__(self, input_ids_BxT: jax.Array) -> jax.Array:
    c, std = self.config, self.config.initializer_range
    words = layers.embed(c.vocab_size, c.dim, "word_embeddings", axis="vocab", std=std)
    positions = layers.embed(
      c.max_position_embeddings,
      c.dim,
      "position_embeddings",
      axis="positions",
      std=std,
    )
    positions_1xT = jnp.arange(input_ids_BxT.shape[1], dtype=jnp.int32)[None, :]
    x_BxTxD = words(input_ids_BxT).astype(self.dtype)
    x_BxTxD += positions(positions_1xT).astype(self.dtype)
    x_BxTxD = layers.Norm(_EPS, name="layer_norm")(x_BxTxD)
    return nn.Dropout(c.dropout)(x_BxTxD, self.deterministic)


class SequenceClassifier(Model):
  """An encoder with a head over its first token; one output is a regression."""

  config: DistilBertConfig

  @nn.compact
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
      input_ids, attention_mask: BxT int32; the mask is 1 where a token is attended to.
      token_type_ids: not looked at, for the model has no types; there so that all
        classifiers of text are called alike.
      deterministic: without dropout; otherwise a "dropout" rng is needed.
    """
    del token_type_ids
    c, dtype = self.config, self.dtype
    check_length(input_ids, c.max_position_embeddings)
    x_BxTxD = Embeddings(c, dtype, deterministic, name="embeddings")(input_ids)
    x_BxTxD = Transformer(
      c, dtype, self.scan, self.remat, deterministic, name="transformer"
    )(x_BxTxD, attention_mask)
    dense = _dense(c, c.dim, ("embed", "pooled"), dtype, "pre_classifier")
    x_BxD = nn.relu(dense(layers.first_token(x_BxTxD)))
    x_BxD = nn.Dropout(c.seq_classif_dropout)(x_BxD, deterministic)
    head = _dense(c, c.num_labels, ("embed", "labels"), dtype, "classifier")
    return head(x_BxD).astype(jnp.float32)


FAMILIES = {
  "distilbert": Family(
    task="sequence-classification",
    architecture="DistilBertForSequenceClassification",
    configure=from_hf,
    build=SequenceClassifier,
    keymap=lambda config, scan: distilbert_keys.keymap(config.n_layers, scan),
    inputs=text_inputs,
    max_length=lambda config: config.max_position_embeddings,
    dropout=("dropout", "attention_dropout"),
    head_dropout=("seq_classif_dropout",),
  )
}
