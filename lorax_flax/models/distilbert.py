"""DistilBERT with a sequence classifier.

BERT's encoder without token types or a pooler, and with fewer dropouts. Source: arXiv
1910.01108, as transformers computes it (DistilBertForSequenceClassification).

Shapes: B batch, T tokens, D dim, C labels.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.hub.checkpoints.entries import (
  each,
  embedding,
  linear,
  norm,
  weight_and_bias,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.models import hf_config as fields
from lorax_flax.models import layers, soft, stacking
from lorax_flax.models.cache import KeyValues, Layout
from lorax_flax.models.family import Family, text_inputs
from lorax_flax.models.layers import Part, TextClassifier, check_length
from lorax_flax.models.soft import SoftSettings

_EPS = 1e-12  # of every norm; config.json has no field for it
_QKV = ("q_lin", "k_lin", "v_lin")


@dataclasses.dataclass(frozen=True)
class DistilBertConfig:
  """DistilBERT's shape, under Hugging Face's field names.

  Attributes:
    num_labels: width of the classifier's output; 1 for regression.
    soft: trained states beside the weights; not in config.json.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  vocab_size: fields.Size = 30522
  dim: fields.Size = 768
  n_layers: fields.Layers = 6
  n_heads: fields.Size = 12
  hidden_dim: fields.Size = 3072
  max_position_embeddings: fields.Size = 512
  activation: fields.Activation = "gelu"
  dropout: fields.Rate = 0.1
  attention_dropout: fields.Rate = 0.1
  seq_classif_dropout: fields.Rate = 0.2
  initializer_range: fields.Positive = 0.02
  num_labels: fields.Size = 2
  soft: SoftSettings | None = None

  def __post_init__(self):
    fields.check_fields(self)
    fields.check_multiple(self, "dim", of="n_heads")


_ALIASES = {
  "hidden_size": "dim",
  "num_attention_heads": "n_heads",
  "num_hidden_layers": "n_layers",
}


class Attention(Part[DistilBertConfig]):
  """Self-attention."""

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, mask_BxT: jax.Array, prefix: KeyValues | None
  ) -> jax.Array:
    c, rate = self.config, self.config.attention_dropout
    qkv_BxTxD = [self.dense(c.dim, ("embed", "heads"), name)(x_BxTxD) for name in _QKV]
    y_BxTxD = layers.attend(self, qkv_BxTxD, mask_BxT, c.n_heads, rate, prefix)
    return self.dense(c.dim, ("heads", "embed"), "out_lin")(y_BxTxD)


class Layer(Part[DistilBertConfig]):
  """One layer, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, mask_BxT: jax.Array, *, kept: KeyValues | None = None
  ):
    c, args = self.config, (self.config, self.dtype, self.deterministic)
    y_BxTxD = Attention(*args, name="attention")(x_BxTxD, mask_BxT, kept)
    y_BxTxD = soft.adapted(self, "attention", y_BxTxD)
    x_BxTxD = layers.Norm(_EPS, name="sa_layer_norm")(x_BxTxD + y_BxTxD)
    feed = layers.MLP(
      *args, ("lin1", "lin2"), c.hidden_dim, c.activation, c.dropout, name="ffn"
    )
    y_BxTxD = soft.adapted(self, "mlp", feed(x_BxTxD))
    return layers.Norm(_EPS, name="output_layer_norm")(x_BxTxD + y_BxTxD), None


class Embeddings(Part[DistilBertConfig]):
  """Token and position embeddings, summed and normed."""

  @nn.compact
  def __call__(self, input_ids_BxT: jax.Array, before: soft.Before) -> jax.Array:
    c, length = self.config, self.config.max_position_embeddings
    words = self.table(c.vocab_size, c.dim, "word_embeddings", "vocab")
    positions = self.table(length, c.dim, "position_embeddings", "positions")
    positions_1xT = jnp.arange(before.mask_BxT.shape[1], dtype=jnp.int32)[None, :]
    x_BxTxD = before.put(words(input_ids_BxT).astype(self.dtype))
    x_BxTxD += positions(before.first + positions_1xT).astype(self.dtype)
    x_BxTxD = layers.Norm(_EPS, name="layer_norm")(x_BxTxD)
    return nn.Dropout(c.dropout)(x_BxTxD, self.deterministic)


class SequenceClassifier(TextClassifier[DistilBertConfig]):
  """A DistilBERT; it has no token types, and ignores those that it is given."""

  @nn.compact
  def logits(self, input_ids, attention_mask, token_type_ids, deterministic):
    del token_type_ids
    c, args = self.config, (self.config, self.dtype, deterministic)
    check_length(input_ids, c.max_position_embeddings - soft.places(c.soft))
    layout = Layout(c.n_heads, c.dim // c.n_heads, (None,) * c.n_layers)
    before = soft.before(self, layout, c.dim, attention_mask)
    x_BxTxD = Embeddings(*args, name="embeddings")(input_ids, before)
    transformer = stacking.Stack(
      Layer, args, c.n_layers, self.scan, self.remat, name="transformer"
    )
    x_BxTxD = transformer(x_BxTxD, before.mask_BxT, **before.each)
    dense = self.dense(c.dim, ("embed", "pooled"), "pre_classifier")
    x_BxD = nn.relu(dense(layers.first_token(x_BxTxD)))
    x_BxD = nn.Dropout(c.seq_classif_dropout)(x_BxD, deterministic)
    return self.dense(c.num_labels, ("embed", "labels"), "classifier")(x_BxD)


# Names in a checkpoint

_LAYER = "transformer/layer_{i}"
_KEY = "transformer.layer.{i}"

_ENTRIES = (
  embedding("embeddings/word_embeddings", "embeddings.word_embeddings"),
  embedding("embeddings/position_embeddings", "embeddings.position_embeddings"),
  *norm("embeddings/layer_norm", "embeddings.LayerNorm"),
  *each(linear, f"{_LAYER}/attention", f"{_KEY}.attention", (*_QKV, "out_lin")),
  *norm(f"{_LAYER}/sa_layer_norm", f"{_KEY}.sa_layer_norm"),
  *each(linear, f"{_LAYER}/ffn", f"{_KEY}.ffn", ("lin1", "lin2")),
  *norm(f"{_LAYER}/output_layer_norm", f"{_KEY}.output_layer_norm"),
  *linear("pre_classifier", "pre_classifier", part="head"),
  *linear("classifier", "classifier", part="head", labels=True),
)

# The masked-language head of pretraining; question answering's.
_OTHER = weight_and_bias(
  "vocab_transform", "vocab_layer_norm", "vocab_projector", "qa_outputs"
)


def keymap(c: DistilBertConfig, scan: bool) -> KeyMap:
  """The key map of a DistilBERT."""
  return KeyMap(
    family="distilbert",
    prefix="distilbert.",
    entries=_ENTRIES,
    counts={"i": c.n_layers},
    scan=scan,
    anchor="embeddings.word_embeddings.weight",
    buffers=("embeddings.position_ids",),
    other_heads=_OTHER,
    head_groups=("pre_classifier", "classifier"),
  )


FAMILIES = {
  "distilbert": Family(
    task="sequence-classification",
    architecture="DistilBertForSequenceClassification",
    configure=partial(fields.read, DistilBertConfig, aliases=_ALIASES),
    build=SequenceClassifier,
    keymap=keymap,
    inputs=text_inputs,
    max_length=lambda config: config.max_position_embeddings,
    soft=soft.PARTS,
    dropout=("dropout", "attention_dropout"),
    head_dropout=("seq_classif_dropout",),
    shards_tokens=lambda config: True,
  )
}
