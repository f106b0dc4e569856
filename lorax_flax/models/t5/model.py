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

from lorax_flax.errors import LoraxError
from lorax_flax.models import cache as caches
from lorax_flax.models import head as heads
from lorax_flax.models import layers, ops, soft, stacking
from lorax_flax.models.cache import Cache, Chunk, KeyValues, Layout
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
  """Attention of one text to another, or to itself."""

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, y_BxSxD: jax.Array | None, attend: Callable[..., Any]
  ) -> tuple[jax.Array, KeyValues | None]:
    """BxTxD, and what a cache keeps of it.

    Args:
      y_BxSxD: the text attended to; None where its keys and values are kept.
      attend: (queries, keys, values, scale=, dropout_rate=, dropout_rng=) -> BxTxHxK,
        and what is kept.
    """
    c, width = self.config, self.config.num_heads * self.config.d_kv
    heads_of = lambda name, x, fan_in: layers.in_heads(
      _dense(c, fan_in, width, ("embed", "heads"), self.dtype, name)(x), c.num_heads
    )
    z_BxTxHxK, kept = attend(
      # Logits aren't scaled, so fresh queries are smaller.
      heads_of("q", x_BxTxD, c.d_model * c.d_kv),
      *(y_BxSxD if y_BxSxD is None else heads_of(n, y_BxSxD, c.d_model) for n in "kv"),
      scale=1.0,
      dropout_rate=c.dropout_rate,
      dropout_rng=layers.dropout_rng(self, c.dropout_rate, self.deterministic),
    )
    z_BxTxHK = z_BxTxHxK.reshape(*x_BxTxD.shape[:-1], width)
    out = _dense(c, width, c.d_model, ("heads", "embed"), self.dtype, "o")
    return out(z_BxTxHK), kept


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


def _sublayer(args, x_BxTxD: jax.Array, name: str, apply) -> tuple[jax.Array, Any]:
  """A residual branch: x plus `apply` of the normed x, and what that keeps."""
  config, _, deterministic = args
  norm = layers.RmsNorm(config.layer_norm_epsilon, name=f"{name}_norm")
  drop = nn.Dropout(config.dropout_rate, deterministic=deterministic)
  y_BxTxD, kept = apply(norm(x_BxTxD))
  return x_BxTxD + drop(y_BxTxD), kept


def _attend_itself(args, x_BxTxD, bias, tokens, kept) -> tuple[jax.Array, Any]:
  """Self-attention; bias and tokens as of `Stack`."""

  def attend(q, k, v, **options):
    if isinstance(tokens, Chunk):
      scale = options["scale"]
      return caches.attend(q, k, v, kept, tokens, bias_BxHxTxS=bias, scale=scale)
    return ops.biased_attention(q, k, v, bias[0], tokens, **options), None

  attention = Attention(*args, name="attention")
  return _sublayer(args, x_BxTxD, "attention", lambda x: attention(x, x, attend))


def _attend_source(args, x_BxTxD, y_BxSxD, mask_BxS, kept) -> tuple[jax.Array, Any]:
  """Attention to the encoder's output, or to the keys and values kept of it."""

  def attend(q, k, v, **options):
    if kept is None:
      return ops.attention(q, k, v, mask_BxS, **options), None
    own_k, own_v = kept
    if k is not None:
      own_k, own_v = (x.swapaxes(1, 2).astype(own_k.dtype) for x in (k, v))
    # Any token of the source is behind every query.
    places_BxT = jnp.zeros(q.shape[:2], jnp.int32)
    places_BxS = (mask_BxS != 0).astype(jnp.int32) - 1
    z_BxTxHxK = ops.attention_by_place(
      q, own_k, own_v, places_BxT, places_BxS, scale=options["scale"]
    )
    return z_BxTxHxK, (own_k, own_v)

  cross = Attention(*args, name="cross_attention")
  return _sublayer(
    args, x_BxTxD, "cross_attention", lambda x: cross(x, y_BxSxD, attend)
  )


def _feed_forward(args, x_BxTxD) -> jax.Array:
  feed = MLP(*args, name="mlp")
  return _sublayer(args, x_BxTxD, "mlp", lambda x: (feed(x), None))[0]


class EncoderLayer(Part[T5Config]):
  """One layer of the encoder, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, bias_1xHxTxT: jax.Array, seen_BxTxT: jax.Array
  ):
    args = (self.config, self.dtype, self.deterministic)
    x_BxTxD, _ = _attend_itself(args, x_BxTxD, bias_1xHxTxT, seen_BxTxT, None)
    return _feed_forward(args, x_BxTxD), None


class DecoderLayer(Part[T5Config]):
  """One layer of the decoder, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    bias: jax.Array,
    tokens: jax.Array | Chunk,
    y_BxSxD: jax.Array | None,
    mask_BxS: jax.Array,
    kept: tuple[KeyValues | None, KeyValues | None] = (None, None),
  ):
    """BxTxD, and what a cache keeps.

    Args:
      bias, tokens: as of `Stack`.
      y_BxSxD, mask_BxS: the encoder's output, None where the cache has its keys and
        values, and its mask.
      kept: of the text and of the encoder's output.
    """
    args = (self.config, self.dtype, self.deterministic)
    own, source = kept
    x_BxTxD, own = _attend_itself(args, x_BxTxD, bias, tokens, own)
    x_BxTxD, source = _attend_source(args, x_BxTxD, y_BxSxD, mask_BxS, source)
    return _feed_forward(args, x_BxTxD), (own, source)


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
  def __call__(
    self, x_BxTxD: jax.Array, tokens: jax.Array | Chunk, *other: Any, kept: Any = None
  ) -> tuple[jax.Array, Any]:
    """BxTxD, and what the layers keep.

    Args:
      tokens: BxTxT, true where a token attends to another; with a cache, their places.
      other: further arguments of each layer.
      kept: the layers of a cache, or None.
    """
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
    if isinstance(tokens, Chunk):
      places, length = tokens.positions_BxT, tokens.length
    else:
      length = x_BxTxD.shape[1]
      places = jnp.arange(length, dtype=jnp.int32)[None]
    bias_BxHxTxS = relative_bias(
      table,
      places,
      length,
      bidirectional=self.bidirectional,
      max_distance=c.relative_attention_max_distance,
    )
    args, shared = (c, self.dtype, self.deterministic), (bias_BxHxTxS, tokens, *other)
    each = {} if kept is None else {"kept": kept}
    x_BxTxD, kept = stacking.stack(
      self, self.layer, args, self.count, drop(x_BxTxD), *shared, each=each
    )
    return drop(layers.RmsNorm(c.layer_norm_epsilon, name="norm")(x_BxTxD)), kept


class ConditionalGenerator(Model[T5Config]):
  """An encoder and a decoder with logits of the next token.

  float16 overflows in large models; bfloat16 has the range.
  """

  @nn.compact
  def __call__(
    self,
    input_ids: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    *,
    decoder_input_ids: jax.Array,
    decoder_attention_mask: jax.Array | None = None,
    cache: Cache | None = None,
    deterministic: bool = True,
    readout: heads.Readout = heads.logits,
  ) -> Any:
    """Logits of the token after each of the decoder's T, BxTxV float32, or another
    readout; with a cache, these and the next one.

    Args:
      input_ids, attention_mask: BxS int32; the mask is 1 where a token is attended to.
        Left out where a cache has the encoder's text already.
      decoder_input_ids, decoder_attention_mask: BxT int32; all ones by default.
      cache: of the decoder's tokens before, to which these are added, and of the
        encoder's text.
      deterministic: without dropout; otherwise a "dropout" rng is needed.
      readout: makes the outputs of the head and of what it takes.

    Raises:
      LoraxError: no text for the encoder, or another length of it than the cache has.
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
    tokens: Any
    source: Any = attention_mask
    y_BxSxD = None
    if input_ids is not None:
      encode = stack(EncoderLayer, c.num_layers, True, name="encoder")
      # PEFT's decoder has no prompt; it attends to the encoder's.
      before = soft.before(self, None, c.d_model, source)
      source = (before.mask_BxT != 0).astype(jnp.int32)
      x_BxSxD = before.put(words(input_ids).astype(dtype))
      y_BxSxD, _ = encode(x_BxSxD, source[:, None, :] != 0)
    elif cache is not None:
      source = cache.source_BxN
    else:
      raise LoraxError("input_ids are needed without a cache that has the encoder's")
    if cache is not None:
      tokens = cache.chunk(decoder_attention_mask, deterministic)
    else:
      before_TxT = jnp.tri(decoder_input_ids.shape[1], dtype=bool)
      tokens = (decoder_attention_mask[:, None, :] != 0) & before_TxT[None]
    decode = stack(DecoderLayer, c.decoder_layers, False, name="decoder")
    x_BxTxD, kept = decode(
      said(decoder_input_ids).astype(dtype),
      tokens,
      y_BxSxD,
      source,
      kept=cache and cache.layers,
    )
    if c.scale_decoder_outputs:
      x_BxTxD = x_BxTxD * c.d_model**-0.5
    if c.scale_decoder_outputs and not c.untied_embeddings:
      head = heads.tied(words.embedding)
    else:
      std *= c.d_model**-0.5
      head = heads.Linear(c.vocab_size, std, name="lm_head")(c.d_model)
    outputs = readout(head, x_BxTxD)
    if cache is None:
      return outputs
    return outputs, cache.grown(kept, tokens, source.astype(jnp.int32))


def inputs(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
  """The smallest inputs; see `Family.inputs`."""
  del config
  ids_BxT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  names = ("input_ids", "attention_mask", "decoder_input_ids")
  return dict.fromkeys(names, ids_BxT)


def cache_layout(c: T5Config) -> Layout:
  """See `Family.cache`."""
  windows = (None,) * c.decoder_layers
  return Layout(c.num_heads, c.d_kv, windows, attends_to_source=True)


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
    cache=cache_layout,
    # PEFT's prefix gives two of the decoder's layers the same states.
    soft=("prompt",),
    dropout=("dropout_rate",),
  )
}
