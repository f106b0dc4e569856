"""DeBERTa-v2 and v3 with a sequence classifier.

BERT's layers with disentangled attention (attention.py); the largest of v2 have
a convolution beside their first layer. Sources: arXiv 2006.03654 and 2111.09543, as
transformers computes them (DebertaV2ForSequenceClassification).

Shapes: B batch, T tokens, D hidden_size, E embedding_size, R rows of the table of
relative positions, C labels.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.models import layers, ops, soft, stacking
from lorax_flax.models.deberta import attention
from lorax_flax.models.deberta import keys as deberta_keys
from lorax_flax.models.deberta.config import DebertaConfig, from_hf
from lorax_flax.models.family import Family, text_inputs
from lorax_flax.models.layers import Part, TextClassifier, check_length


class Branch(NamedTuple):
  """The convolution's output, which joins the first layer's, and the sum's norm."""

  y_BxTxD: jax.Array
  real_BxTx1: jax.Array
  scale_D: jax.Array
  bias_D: jax.Array


class Layer(Part[DebertaConfig]):
  """One encoder layer, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self, x_BxTxD, pairs_BxTxT, rel_RxD, branch: Branch | None, *, first=False
  ):
    c = self.config
    args = (c, self.dtype, self.deterministic)
    attend = attention.Attention(*args, name="attention")
    x_BxTxD = attend(x_BxTxD, pairs_BxTxT, rel_RxD)
    up = self.dense(c.intermediate_size, ("embed", "mlp"), "intermediate")
    down = self.dense(c.hidden_size, ("mlp", "embed"), "output")
    y_BxTxD = down(ops.activation(c.hidden_act)(up(x_BxTxD)))
    y_BxTxD = nn.Dropout(c.hidden_dropout_prob)(y_BxTxD, self.deterministic)
    y_BxTxD = soft.adapted(self, "mlp", y_BxTxD)
    x_BxTxD = layers.Norm(c.layer_norm_eps, name="layer_norm")(x_BxTxD + y_BxTxD)
    if branch is None:
      return x_BxTxD, None

    def joined(x_BxTxD):
      sum_BxTxD = x_BxTxD + branch.y_BxTxD
      norm = ops.layer_norm(sum_BxTxD, branch.scale_D, branch.bias_D, c.layer_norm_eps)
      return norm * branch.real_BxTx1

    # A conditional, not a select of two results: only one layer computes it.
    return jax.lax.cond(first, joined, lambda x_BxTxD: x_BxTxD, x_BxTxD), None


class Conv(Part[DebertaConfig]):
  """The convolution of the embeddings that joins the first layer's output.

  It depends on no layer, so it runs once, before them, and they can be scanned.
  """

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, real_BxTx1: jax.Array) -> Branch:
    c, size = self.config, self.config.conv_kernel_size
    normal = nn.initializers.normal(c.initializer_range)
    axes = ("width", "embed", "pooled")
    conv = nn.Conv(
      c.hidden_size,
      (size,),
      padding=[(size // 2, size // 2)],
      feature_group_count=c.conv_groups,
      dtype=self.dtype,
      kernel_init=nn.with_logical_partitioning(normal, axes),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[-1:]),
      name="conv",
    )
    # At padding too: `Layer` sets the sum to zero there.
    y_BxTxD = nn.Dropout(c.hidden_dropout_prob)(conv(x_BxTxD), self.deterministic)
    y_BxTxD = ops.activation(c.conv_act)(y_BxTxD)
    norm = layers.NormWeights(name="layer_norm")(c.hidden_size)
    return Branch(y_BxTxD, real_BxTx1, *norm)


class Encoder(Part[DebertaConfig]):
  """All layers, and the table of relative positions that they share."""

  scan: bool
  remat: str

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    c = self.config
    args = (c, self.dtype, self.deterministic)
    real_BxT = mask_BxT != 0
    rel_RxD = branch = None
    if c.relative_attention:
      used = attention.used(c, x_BxTxD.shape[1])
      table = self.table(2 * c.span, c.hidden_size, "rel_embeddings", "positions")
      rel_RxD = table(used[None, :])[0].astype(self.dtype)
      if c.norm_rel_ebd:
        rel_RxD = layers.Norm(c.layer_norm_eps, name="rel_norm")(rel_RxD)
    each = {}
    if c.conv_kernel_size:
      real_BxTx1 = real_BxT[..., None].astype(self.dtype)
      branch = Conv(*args, name="conv")(x_BxTxD, real_BxTx1)
      each = {"first": np.arange(c.num_hidden_layers) == 0}
    pairs_BxTxT, count = (
      real_BxT[:, :, None] & real_BxT[:, None, :],
      c.num_hidden_layers,
    )
    x_BxTxD, _ = stacking.stack(
      self, Layer, args, count, x_BxTxD, pairs_BxTxT, rel_RxD, branch, each=each
    )
    return x_BxTxD


class Embeddings(Part[DebertaConfig]):
  """Token embeddings, with positions and types where the model has these, normed."""

  @nn.compact
  def __call__(
    self, input_ids_BxT, token_type_ids_BxT, before: soft.Before
  ) -> jax.Array:
    c, mask_BxT = self.config, before.mask_BxT

    def look_up(name, rows, axis, ids):
      return self.table(rows, c.embedded, name, axis)(ids).astype(self.dtype)

    x_BxTxE = look_up("word_embeddings", c.vocab_size, "vocab", input_ids_BxT)
    x_BxTxE = before.put(x_BxTxE)
    if c.position_biased_input:
      positions_1xT = jnp.arange(mask_BxT.shape[1], dtype=jnp.int32)[None, :]
      x_BxTxE += look_up(
        "position_embeddings", c.max_position_embeddings, "positions", positions_1xT
      )
    if c.type_vocab_size:
      types_BxT = before.fill(token_type_ids_BxT, 0)
      x_BxTxE += look_up("token_type_embeddings", c.type_vocab_size, "types", types_BxT)
    x_BxTxD = x_BxTxE
    if c.embedded != c.hidden_size:
      axes = ("embed", "pooled")
      project = self.dense(c.hidden_size, axes, "embed_proj", bias=False)
      x_BxTxD = project(x_BxTxE)
    x_BxTxD = layers.Norm(c.layer_norm_eps, name="layer_norm")(x_BxTxD)
    x_BxTxD *= (mask_BxT != 0)[..., None].astype(self.dtype)
    return nn.Dropout(c.hidden_dropout_prob)(x_BxTxD, self.deterministic)


class SequenceClassifier(TextClassifier[DebertaConfig]):
  """A DeBERTa."""

  @nn.compact
  def logits(self, input_ids, attention_mask, token_type_ids, deterministic):
    c, args = self.config, (self.config, self.dtype, deterministic)
    if c.position_biased_input:
      check_length(input_ids, c.max_position_embeddings - soft.places(c.soft))
    before = soft.before(self, None, c.embedded, attention_mask)
    embed = Embeddings(*args, name="embeddings")
    x_BxTxD = embed(input_ids, token_type_ids, before)
    encoder = Encoder(*args, self.scan, self.remat, name="encoder")
    x_BxTxD = encoder(x_BxTxD, before.mask_BxT)
    x_BxD = nn.Dropout(c.pooler_dropout)(layers.first_token(x_BxTxD), deterministic)
    dense = self.dense(c.hidden_size, ("embed", "pooled"), "pooler")
    x_BxD = ops.activation(c.pooler_hidden_act)(dense(x_BxD))
    x_BxD = nn.Dropout(c.head_dropout)(x_BxD, deterministic)
    return self.dense(c.num_labels, ("embed", "labels"), "classifier")(x_BxD)


FAMILIES = {
  "deberta-v2": Family(
    task="sequence-classification",
    architecture="DebertaV2ForSequenceClassification",
    configure=from_hf,
    build=SequenceClassifier,
    keymap=deberta_keys.keymap,
    inputs=text_inputs,
    max_length=lambda config: config.max_position_embeddings,
    # A key without a token has no distance to the queries.
    soft=[name for name in soft.PARTS if name != "prefix"],
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    head_dropout=("cls_dropout",),
  )
}
