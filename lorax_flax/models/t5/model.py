"""T5 for conditional generation, v1.0 and v1.1.

An encoder reads a text, a decoder writes another and attends to the encoder's output.
Norms come before attention and MLP, divide by the root mean square alone and have no
bias; logits of attention aren't scaled, and get a bias by relative position. v1.0 has a
plain MLP and a head that is the token embeddings, with scaled inputs; v1.1 has a gated
MLP and a head of its own. Source: arXiv 1910.10683 and 2002.05202, as
transformers computes them (T5ForConditionalGeneration).

Shapes: B batch, T tokens of the text that attends, S of the attended one, D d_model,
H heads, K head size, V vocab_size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.models import head as heads
from lorax_flax.models import layers, ops, stacking
from lorax_flax.models.family import Family
from lorax_flax.models.layers import Model, Part
from lorax_flax.models.t5 import keys as t5_keys
from lorax_flax.models.t5.config import T5Config, from_hf
from lorax_flax.models.t5.positions import relative_bias


def _dense(
  config: T5Config, fan_in: int, features: int, axes, dtype, name: str
) -> nn.Dense:
  std = config.initializer_factor * fan_in**-0.5
  return layers.dense(features, axes, dtype, name, std=std, bias=False)


class Attention(Part[T5Config]):
  """Attention of one text to another, or to itself.

  Attributes:
    attend: (queries, keys, values, dropout_rate=, dropout_rng=) -> BxTxHxK.
  """

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, y_BxSxD: jax.Array, attend: Callable[..., jax.Array]
  ) -> jax.Array:
    c, width = self.config, self.config.num_heads * self.config.d_kv
    heads_of = lambda name, x, fan_in: layers.in_heads(
      _dense(c, fan_in, width, ("embed", "heads"), self.dtype, name)(x), c.num_heads
    )
    z_BxTxHxK = attend(
      # Logits aren't scaled, so fresh queries are smaller.
      heads_of("q", x_BxTxD, c.d_model * c.d_kv),
      heads_of("k", y_BxSxD, c.d_model),
      heads_of("v", y_BxSxD, c.d_model),
      scale=1.0,
      dropout_rate=c.dropout_rate,
      dropout_rng=layers.dropout_rng(self, c.dropout_rate, self.deterministic),
    )
    z_BxTxHK = z_BxTxHxK.reshape(*x_BxTxD.shape[:-1], width)
    return _dense(c, width, c.d_model, ("heads", "embed"), self.dtype, "o")(z_BxTxHK)


class MLP(Part[T5Config]):
  """Two dense layers, or three with a gate."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c, act = self.config, self.config.activation
    up = lambda name: _dense(c, c.d_model, c.d_ff, ("embed", "mlp"), self.dtype, name)
    if c.gated:
      h_BxTxF = ops.gated(act, up("wi_0")(x_BxTxD), up("wi_1")(x_BxTxD))
    else:
      h_BxTxF = ops.activation(act)(up("wi")(x_BxTxD))
    h_BxTxF = nn.Dropout(c.dropout_rate)(h_BxTxF, self.deterministic)
    return _dense(c, c.d_ff, c.d_model, ("mlp", "embed"), self.dtype, "wo")(h_BxTxF)


def _sublayer(args, x_BxTxD: jax.Array, name: str, apply) -> jax.Array:
  """A residual branch: x plus `apply` of the normed x."""
  config, _, deterministic = args
  norm = layers.RmsNorm(config.layer_norm_epsilon, name=f"{name}_norm")
  drop = nn.Dropout(config.dropout_rate, deterministic=deterministic)
  return x_BxTxD + drop(apply(norm(x_BxTxD)))


def _attend_itself(args, x_BxTxD, bias_HxTxT, seen_BxTxT) -> jax.Array:
  attend = partial(ops.biased_attention, bias_HxTxS=bias_HxTxT, seen_BxTxS=seen_BxTxT)
  attention = Attention(*args, name="attention")
  return _sublayer(args, x_BxTxD, "attention", lambda x: attention(x, x, attend))


def _feed_forward(args, x_BxTxD) -> jax.Array:
  return _sublayer(args, x_BxTxD, "mlp", MLP(*args, name="mlp"))


class EncoderLayer(Part[T5Config]):
  """One layer of the encoder, in the form of nn.scan."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, bias_HxTxT: jax.Array, seen_BxTxT: jax.Array):
    args = (self.config, self.dtype, self.deterministic)
    x_BxTxD = _attend_itself(args, x_BxTxD, bias_HxTxT, seen_BxTxT)
    return _feed_forward(args, x_BxTxD), None


class DecoderLayer(Part[T5Config]):
  """One layer of the decoder, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    bias_HxTxT: jax.Array,
    seen_BxTxT: jax.Array,
    y_BxSxD: jax.Array,
    mask_BxS: jax.Array,
  ):
    """(BxTxD, None). y_BxSxD, mask_BxS: the encoder's output, and its mask."""
    args = (self.config, self.dtype, self.deterministic)
    x_BxTxD = _attend_itself(args, x_BxTxD, bias_HxTxT, seen_BxTxT)
    attend = partial(ops.attention, mask_BxS=mask_BxS)
    cross = Attention(*args, name="cross_attention")
    x_BxTxD = _sublayer(
      args, x_BxTxD, "cross_attention", lambda x: cross(x, y_BxSxD, attend)
    )
    return _feed_forward(args, x_BxTxD), None


class Stack(Part[T5Config]):
  """The layers of the encoder or of the decoder, and their relative positions.

  Attributes:
    layer, count: the layers' class and number.
    bidirectional: distinguish positions after a token's own.
  """

  scan: bool
  remat: str
  layer: Any
  count: int
  bidirectional: bool

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array, seen_BxTxT: jax.Array, *other) -> jax.Array:
    c = self.config
    drop = nn.Dropout(c.dropout_rate, deterministic=self.deterministic)
    table = layers.embed(
      c.relative_attention_num_buckets,
      c.num_heads,
      "relative_bias",
      axis="buckets",
      along="heads",
      std=c.initializer_factor * c.d_model**-0.5,
    )
    bias_HxTxT = relative_bias(
      table,
      x_BxTxD.shape[1],
      bidirectional=self.bidirectional,
      max_distance=c.relative_attention_max_distance,
    )
    args, shared = (c, self.dtype, self.deterministic), (bias_HxTxT, seen_BxTxT, *other)
    x_BxTxD, _ = stacking.stack(
      self, self.layer, args, self.count, drop(x_BxTxD), *shared
    )
    return drop(layers.RmsNorm(c.layer_norm_epsilon, name="norm")(x_BxTxD))


class ConditionalGenerator(Model[T5Config]):
  """An encoder and a decoder with logits of the next token.

  float16 overflows in large models; bfloat16 has the range.
  """

  @nn.compact
  def __call__(
    self,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    decoder_input_ids: jax.Array,
    decoder_attention_mask: jax.Array | None = None,
    *,
    deterministic: bool = True,
    readout: heads.Readout = heads.logits,
  ) -> Any:
    """Logits of the token after each of the decoder's T, BxTxV float32, or another
    readout.

    Args:
      input_ids, attention_mask: BxS int32; the mask is 1 where a token is attended to.
      decoder_input_ids, decoder_attention_mask: BxT int32; all ones by default.
      deterministic: without dropout; otherwise a "dropout" rng is needed.
      readout: makes the outputs of the head and of what it takes.
    """
    c, dtype, std = self.config, self.dtype, self.config.initializer_factor
    table = partial(layers.embed, c.vocab_size, c.d_model, axis="vocab", std=std)
    if c.untied_embeddings:
      words, said = table("encoder_embed_tokens"), table("decoder_embed_tokens")
    else:
      words = said = table("shared")
    stack = partial(Stack, c, dtype, deterministic, self.scan, self.remat)
    if decoder_attention_mask is None:
      decoder_attention_mask = jnp.ones_like(decoder_input_ids)
    encode = stack(EncoderLayer, c.num_layers, True, name="encoder")
    y_BxSxD = encode(words(input_ids).astype(dtype), attention_mask[:, None, :] != 0)
    before_TxT = jnp.tri(decoder_input_ids.shape[1], dtype=bool)
    decode = stack(DecoderLayer, c.decoder_layers, False, name="decoder")
    x_BxTxD = decode(
      said(decoder_input_ids).astype(dtype),
      (decoder_attention_mask[:, None, :] != 0) & before_TxT[None],
      y_BxSxD,
      attention_mask,
    )
    if c.scale_decoder_outputs:
      x_BxTxD = x_BxTxD * c.d_model**-0.5
      if not c.untied_embeddings:
        return readout(heads.tied(words.embedding), x_BxTxD)
    std *= c.d_model**-0.5
    head = heads.Linear(c.vocab_size, std, name="lm_head")(c.d_model)
    return readout(head, x_BxTxD)


def inputs(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
  """The smallest inputs; see `Family.inputs`."""
  del config
  ids_BxT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  names = ("input_ids", "attention_mask", "decoder_input_ids")
  return dict.fromkeys(names, ids_BxT)


FAMILIES = {
  "t5": Family(
    task="seq2seq-lm",
    architecture="T5ForConditionalGeneration",
    configure=from_hf,
    build=ConditionalGenerator,
    keymap=t5_keys.keymap,
    inputs=inputs,
    untied={"untied_embeddings": True},
    max_length=lambda config: config.n_positions,
    dropout=("dropout_rate",),
  )
}
