"""The decoder that Llama and its variants share, with a language model's head.

Sources: arXiv 2302.13971 (Llama) and its variants' reports, as transformers computes
them (LlamaForCausalLM and so on). Their differences are data: see config.py and
variants.py.

Shapes: B batch, T tokens, D hidden_size, H heads of queries, G heads of keys and
values, K head size, M intermediate_size, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.models import head as heads
from lorax_flax.models import layers, ops, soft, stacking
from lorax_flax.models.cache import Cache, Chunk, KeyValues
from lorax_flax.models.layers import Model, Module, Part
from lorax_flax.models.llama import moe
from lorax_flax.models.llama.config import DecoderConfig

# The window of a layer without one, where others have one.
_ALL = np.int32(2**30)


def _norm(c: DecoderConfig, name: str, axis: str = "embed") -> layers.RmsNorm:
  return layers.RmsNorm(c.rms_norm_eps, c.norm.offset, c.norm.late, axis, name=name)


class Attention(Part[DecoderConfig]):
  """Causal self-attention with rotary positions."""

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    tokens: jax.Array | Chunk,
    rotations: ops.Rotations,
    window: int | jax.Array | None,
    kept: KeyValues | None,
  ) -> tuple[jax.Array, KeyValues | None]:
    c, size = self.config, self.config.head_size
    made = [
      self.dense(n * size, ("embed", "heads"), name, c.attention_bias)(x_BxTxD)
      for name, n in c.attention_names.items()
    ]
    if c.fused:
      last_q = c.num_attention_heads * size
      made = jnp.split(made[0], [last_q, last_q + c.kv_heads * size], axis=-1)
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = (
      layers.in_heads(x, x.shape[-1] // size) for x in made
    )
    if c.qk_norm:
      q_BxTxHxK = _norm(c, "q_norm", "head")(q_BxTxHxK)
      k_BxTxGxK = _norm(c, "k_norm", "head")(k_BxTxGxK)
    y_BxTxHxK, kept = layers.attend_before(
      self,
      ops.rotate(q_BxTxHxK, rotations),
      ops.rotate(k_BxTxGxK, rotations),
      v_BxTxGxK,
      tokens,
      kept,
      c.attention_dropout,
      window=window,
      scale=c.attention_scale,
      softcap=c.attn_logit_softcapping,
    )
    y = y_BxTxHxK.reshape((*x_BxTxD.shape[:-1], -1))
    axes, bias = ("heads", "embed"), c.has_output_bias
    return self.dense(c.hidden_size, axes, "o_proj", bias)(y), kept


class FeedForward(Module[DecoderConfig]):
  """A gated feed-forward part (arXiv 2002.05202)."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c = self.config
    made = [
      self.dense(features, ("embed", "mlp"), name, c.mlp_bias)(x_BxTxD)
      for name, features in c.mlp_names.items()
    ]
    gate_BxTxM, up_BxTxM = jnp.split(made[0], 2, axis=-1) if c.fused else made
    y_BxTxM = ops.gated(c.hidden_act, gate_BxTxM, up_BxTxM)
    return self.dense(c.hidden_size, ("mlp", "embed"), "down_proj", c.mlp_bias)(y_BxTxM)


class Layer(Part[DecoderConfig]):
  """One layer, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    tokens: jax.Array | Chunk,
    rotations: ops.Rotations,
    *,
    window: jax.Array | None = None,
    rope: jax.Array | None = None,
    kept: KeyValues | None = None,
  ) -> tuple[jax.Array, KeyValues | None]:
    """The layer's output, and what a cache keeps of it.

    Args:
      tokens, kept: see `layers.attend_before`.
      rotations: of the rotary positions; stacked, if there is more than one kind.
      window, rope: of this layer, where layers differ.
    """
    c = self.config
    if rope is not None:
      rotations = (rotations[0][rope], rotations[1][rope])
    own = c.windows[0] if window is None else window

    def normed(name, y):
      return _norm(c, name)(y) if name else y

    def dropped(y):
      return nn.Dropout(c.resid_pdrop)(y, self.deterministic)

    before, after, before_mlp, after_mlp = c.layer_norms
    attend = Attention(c, self.dtype, self.deterministic, name="self_attn")
    y_BxTxD, kept = attend(normed(before, x_BxTxD), tokens, rotations, own, kept)
    y_BxTxD = dropped(normed(after, y_BxTxD))
    x_BxTxD += soft.adapted(self, "attention", y_BxTxD)
    feed = FeedForward if c.num_experts is None else moe.Mixture
    y_BxTxD = feed(c, self.dtype, name="mlp")(normed(before_mlp, x_BxTxD))
    y_BxTxD = dropped(normed(after_mlp, y_BxTxD))
    return x_BxTxD + soft.adapted(self, "mlp", y_BxTxD), kept


def _stacked(*kinds: jax.Array) -> jax.Array:
  return jnp.stack(jnp.broadcast_arrays(*kinds))


class Decoder(Part[DecoderConfig]):
  """Embeddings, layers and the final norm."""

  scan: bool
  remat: str

  @nn.compact
  def __call__(
    self, input_ids_BxT, before: soft.Before, tokens, positions_BxT, lengths_BxT
  ) -> tuple[jax.Array, jax.Array, Any]:
    """x_BxTxD, the table of token embeddings, VxD, and what the layers keep."""
    c, dtype = self.config, self.dtype
    words = self.table(c.vocab_size, c.hidden_size, "embed_tokens", "vocab")
    x_BxTxD = words(input_ids_BxT).astype(dtype)
    if c.embed_scaled:
      x_BxTxD *= jnp.asarray(c.hidden_size**0.5, dtype)
    x_BxTxD = before.put(x_BxTxD)
    rotations = [
      ops.rotations(rope, c.head_size, positions_BxT, lengths_BxT, dtype)
      for rope in c.ropes
    ]
    each = dict(before.each)
    turned = rotations[0]
    if c.ropes_differ:
      turned = jax.tree.map(_stacked, *rotations)
      each["rope"] = np.asarray(c.rope_of, np.int32)
    if c.windows_differ:
      windows = [_ALL if window is None else window for window in c.windows]
      each["window"] = np.asarray(windows, np.int32)
    args = (c, dtype, self.deterministic)
    x_BxTxD, kept = stacking.stack(
      self, Layer, args, c.num_hidden_layers, x_BxTxD, tokens, turned, each=each
    )
    return _norm(c, "norm")(x_BxTxD), words.embedding, kept


class CausalLM(Model[DecoderConfig]):
  """A decoder with a language model's head."""

  @nn.compact
  def __call__(
    self,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    position_ids: jax.Array | None = None,
    *,
    cache: Cache | None = None,
    deterministic: bool = True,
    readout: heads.Readout = heads.logits,
  ) -> Any:
    """Logits of the next token at each position, BxTxV float32, or another readout.

    Called with a cache, it returns these and the next cache.

    Args:
      input_ids, attention_mask: BxT int32; the mask is 1 where a token is attended to,
        or the number of its segment, 1, 2, 3, …, that attends to itself alone. Where it
        is 0 the logits are meaningless.
      position_ids: BxT int32; by default 0, 1, 2, …, padding included.
      cache: of the tokens before, to which these are added; the mask is then 1 where
        there is a token, and position_ids follow from it.
      deterministic: without dropout; otherwise a "dropout" rng is needed.
      readout: makes the outputs of the head and of what it takes.
    """
    c, dtype = self.config, self.dtype
    before = soft.before(
      self, c.cache_layout, c.hidden_size, attention_mask, position_ids, cache
    )
    mask_BxT, position_ids, cache = before.mask_BxT, before.position_ids, before.cache
    seen_BxT = mask_BxT != 0
    # Each text's own: an answer must not depend on padding or on the texts beside it.
    tokens: Any = mask_BxT
    if cache is not None:
      tokens = cache.chunk(mask_BxT, deterministic, position_ids)
      # Keys stay as they were written: a scaling that looks at the length does not
      # reach back, as in transformers, which for Phi-3 alone computes all anew.
      position_ids, lengths_BxT = tokens.positions_BxT, tokens.ends_B[:, None]
    elif position_ids is None:
      columns_T = jnp.arange(mask_BxT.shape[1], dtype=jnp.int32)
      position_ids = before.first + columns_T[None, :]
      first_Bx1 = jnp.argmax(seen_BxT, axis=1, keepdims=True).astype(jnp.int32)
      ends_BxT = jnp.where(seen_BxT, position_ids + 1, 0)
      lengths_BxT = jnp.max(ends_BxT, axis=1, keepdims=True) - first_Bx1
    else:
      if c.soft and soft.places(c.soft) and any(c.windows):
        raise LoraxError(
          f"soft.method={c.soft.method} with packed texts: a window of attention"
          " counts columns, and would lose what is before a text that begins later"
        )
      same_BxTxT = mask_BxT[:, :, None] == mask_BxT[:, None, :]
      ends_BxTxT = jnp.where(same_BxTxT, position_ids[:, None, :] + 1, 0)
      lengths_BxT = jnp.max(ends_BxTxT, axis=2)
    decoder = Decoder(c, dtype, deterministic, self.scan, self.remat, name="model")
    x_BxTxD, table_VxD, kept = decoder(
      input_ids, before, tokens, position_ids, lengths_BxT
    )
    if c.tie_word_embeddings:
      head = heads.tied(table_VxD)
    else:
      std = c.initializer_range
      head = heads.Linear(c.vocab_size, std, name="lm_head")(c.hidden_size)
    head = replace(head, cap=c.final_logit_softcapping)
    outputs = readout(head, before.cut(x_BxTxD))
    return outputs if cache is None else (outputs, cache.grown(kept, tokens))
