"""BERT and RoBERTa: the bare encoder, and sequence classifiers on top of it.

The two share every layer. They differ in how a position is numbered and in the head:
BERT pools the first token through a pretrained dense layer, RoBERTa's classifier
brings its own. Sources: arXiv 1810.04805 and 1907.11692, as transformers computes
them (BertForSequenceClassification, RobertaForSequenceClassification).

Shapes: B batch, T tokens, D hidden_size, C labels.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.models import hf_config as fields
from lorax_flax.models import layers, ops, soft, stacking
from lorax_flax.models.bert import keys as bert_keys
from lorax_flax.models.bert.config import UNSUPPORTED, EncoderConfig
from lorax_flax.models.cache import KeyValues, Layout
from lorax_flax.models.family import Family, text_inputs
from lorax_flax.models.layers import Part, TextClassifier, check_length


def positions(
  input_ids_BxT: jax.Array, config: EncoderConfig, before: soft.Before
) -> jax.Array:
  """The number of each token's position, BxT, the prompt's before the tokens'.

  BERT's are 0, 1, 2, …, padding included. RoBERTa counts tokens from pad + 1, and
  padding stays at pad.
  """
  if config.model_type == "bert":
    positions_T = jnp.arange(before.mask_BxT.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(before.first + positions_T[None], before.mask_BxT.shape)
  real_BxT = (input_ids_BxT != config.pad_token_id).astype(jnp.int32)
  real_BxT = before.fill(real_BxT, 1)
  count_BxT = before.first + jnp.cumsum(real_BxT, axis=1)
  return count_BxT * real_BxT + config.pad_token_id


class Attention(Part[EncoderConfig]):
  """Self-attention, its output added to its input and normed."""

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, mask_BxT: jax.Array, prefix: KeyValues | None
  ) -> jax.Array:
    c = self.config
    qkv_BxTxD = [
      self.dense(c.hidden_size, ("embed", "heads"), name)(x_BxTxD)
      for name in ("query", "key", "value")
    ]
    heads, rate = c.num_attention_heads, c.attention_probs_dropout_prob
    y_BxTxD = layers.attend(self, qkv_BxTxD, mask_BxT, heads, rate, prefix)
    y_BxTxD = self.dense(c.hidden_size, ("heads", "embed"), "output")(y_BxTxD)
    y_BxTxD = nn.Dropout(c.hidden_dropout_prob)(y_BxTxD, self.deterministic)
    y_BxTxD = soft.adapted(self, "attention", y_BxTxD)
    return layers.Norm(c.layer_norm_eps, name="layer_norm")(x_BxTxD + y_BxTxD)


class Layer(Part[EncoderConfig]):
  """One encoder layer, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, mask_BxT: jax.Array, *, kept: KeyValues | None = None
  ):
    c = self.config
    attend = Attention(c, self.dtype, self.deterministic, name="attention")
    x_BxTxD = attend(x_BxTxD, mask_BxT, kept)
    up = self.dense(c.intermediate_size, ("embed", "mlp"), "intermediate")
    down = self.dense(c.hidden_size, ("mlp", "embed"), "output")
    y_BxTxD = down(ops.activation(c.hidden_act)(up(x_BxTxD)))
    y_BxTxD = nn.Dropout(c.hidden_dropout_prob)(y_BxTxD, self.deterministic)
    y_BxTxD = soft.adapted(self, "mlp", y_BxTxD)
    return layers.Norm(c.layer_norm_eps, name="layer_norm")(x_BxTxD + y_BxTxD), None


class Embeddings(Part[EncoderConfig]):
  """Token, position and type embeddings, summed and normed."""

  @nn.compact
  def __call__(
    self, input_ids_BxT, token_type_ids_BxT, before: soft.Before
  ) -> jax.Array:
    c = self.config

    def look_up(name, rows, axis, ids_BxT):
      return self.table(rows, c.hidden_size, name, axis)(ids_BxT).astype(self.dtype)

    positions_BxT = positions(input_ids_BxT, c, before)
    x_BxTxD = look_up("word_embeddings", c.vocab_size, "vocab", input_ids_BxT)
    x_BxTxD = before.put(x_BxTxD)
    types_BxT = before.fill(token_type_ids_BxT, 0)
    x_BxTxD += look_up("token_type_embeddings", c.type_vocab_size, "types", types_BxT)
    x_BxTxD += look_up(
      "position_embeddings", c.max_position_embeddings, "positions", positions_BxT
    )
    x_BxTxD = layers.Norm(c.layer_norm_eps, name="layer_norm")(x_BxTxD)
    return nn.Dropout(c.hidden_dropout_prob)(x_BxTxD, self.deterministic)


class SequenceClassifier(TextClassifier[EncoderConfig]):
  """A BERT or RoBERTa."""

  @nn.compact
  def logits(self, input_ids, attention_mask, token_type_ids, deterministic):
    c, args = self.config, (self.config, self.dtype, deterministic)
    check_length(input_ids, max_length(c) - soft.places(c.soft))
    size = c.hidden_size // c.num_attention_heads
    layout = Layout(c.num_attention_heads, size, (None,) * c.num_hidden_layers)
    before = soft.before(self, layout, c.hidden_size, attention_mask)
    x_BxTxD = Embeddings(*args, name="embeddings")(input_ids, token_type_ids, before)
    encoder = stacking.Stack(
      Layer, args, c.num_hidden_layers, self.scan, self.remat, name="encoder"
    )
    x_BxTxD = encoder(x_BxTxD, before.mask_BxT, **before.each)
    # The first of a prompt's, where there is one, as PEFT has it.
    x_BxD = layers.first_token(x_BxTxD)
    if c.model_type != "bert":
      return RobertaHead(*args, name="classifier")(x_BxD)
    dense = self.dense(c.hidden_size, ("embed", "pooled"), "pooler")
    x_BxD = nn.Dropout(c.head_dropout)(jnp.tanh(dense(x_BxD)), deterministic)
    return self.dense(c.num_labels, ("embed", "labels"), "classifier")(x_BxD)


class RobertaHead(Part[EncoderConfig]):
  """A classifier with a dense layer of its own."""

  @nn.compact
  def __call__(self, x_BxD: jax.Array) -> jax.Array:
    c = self.config
    x_BxD = nn.Dropout(c.head_dropout)(x_BxD, self.deterministic)
    dense = self.dense(c.hidden_size, ("embed", "pooled"), "dense")
    x_BxD = nn.Dropout(c.head_dropout)(jnp.tanh(dense(x_BxD)), self.deterministic)
    return self.dense(c.num_labels, ("embed", "labels"), "out_proj")(x_BxD)


def max_length(config: EncoderConfig) -> int:
  """The maximal number of tokens; RoBERTa's positions begin after its padding's."""
  offset = 0 if config.model_type == "bert" else config.pad_token_id + 1
  return config.max_position_embeddings - offset


_SIZES = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "type_vocab_size": 2,
}


def _family(model_type: str, architecture: str, vocab: int, pad: int) -> Family:
  # transformers' defaults for fields that config.json leaves out.
  defaults = {**_SIZES, "vocab_size": vocab, "pad_token_id": pad}
  return Family(
    task="sequence-classification",
    architecture=architecture,
    configure=partial(fields.read, EncoderConfig, defaults=defaults, only=UNSUPPORTED),
    build=SequenceClassifier,
    keymap=lambda config, scan: bert_keys.keymap(
      model_type, config.num_hidden_layers, scan
    ),
    inputs=text_inputs,
    max_length=max_length,
    soft=soft.PARTS,
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    head_dropout=("classifier_dropout",),
    shards_tokens=lambda config: True,
  )


FAMILIES = {
  "bert": _family("bert", "BertForSequenceClassification", 30522, 0),
  "roberta": _family("roberta", "RobertaForSequenceClassification", 50265, 1),
  "xlm-roberta": _family(
    "xlm-roberta", "XLMRobertaForSequenceClassification", 30522, 1
  ),
}
