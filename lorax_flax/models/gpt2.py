"""GPT-2, a causal language model.

Learned positions, norms before attention and MLP, and a head tied to the token
embeddings. Source: Radford et al. 2019, "Language models are unsupervised multitask
learners", as transformers computes it (GPT2LMHeadModel).

Shapes: B batch, T tokens, D n_embd, V vocab_size.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.hub.checkpoints.entries import (
  Entries,
  Entry,
  each,
  embedding,
  linear,
  norm,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.models import head as heads
from lorax_flax.models import hf_config as fields
from lorax_flax.models import layers, soft, stacking
from lorax_flax.models.cache import Cache, Chunk, KeyValues, Layout
from lorax_flax.models.family import Family, text_inputs
from lorax_flax.models.layers import Model, Part, check_length
from lorax_flax.models.soft import SoftSettings


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """GPT-2's shape, under Hugging Face's field names.

  Attributes:
    n_inner: features inside the MLP; None takes 4 · n_embd.
    scale_attn_weights: attention's logits are divided by sqrt(head size).
    scale_attn_by_inverse_layer_idx: and by the number of their layer, from 1.
    tie_word_embeddings: the head is the token embeddings, not a layer of its own.
    soft: trained states beside the weights; not in config.json.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  vocab_size: fields.Size = 50257
  n_positions: fields.Size = 1024
  n_embd: fields.Size = 768
  n_layer: fields.Layers = 12
  n_head: fields.Size = 12
  n_inner: fields.Size | None = None
  activation_function: fields.Activation = "gelu_new"
  resid_pdrop: fields.Rate = 0.1
  embd_pdrop: fields.Rate = 0.1
  attn_pdrop: fields.Rate = 0.1
  layer_norm_epsilon: fields.Positive = 1e-5
  initializer_range: fields.Positive = 0.02
  scale_attn_weights: bool = True
  scale_attn_by_inverse_layer_idx: bool = False
  tie_word_embeddings: bool = True
  soft: SoftSettings | None = None

  def __post_init__(self):
    fields.check_fields(self)
    fields.check_multiple(self, "n_embd", of="n_head")


_ALIASES = {
  "hidden_size": "n_embd",
  "max_position_embeddings": "n_positions",
  "num_attention_heads": "n_head",
  "num_hidden_layers": "n_layer",
}


class Attention(Part[GPT2Config]):
  """Self-attention of each token to those before it and to itself."""

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    tokens: jax.Array | Chunk,
    number: jax.Array | None,
    kept: KeyValues | None,
  ) -> tuple[jax.Array, KeyValues | None]:
    """BxTxD, and what a cache keeps; see `layers.attend_before`.

    Args:
      number: divisor of attention's logits, or None.
    """
    c = self.config
    fused = self.dense(3 * c.n_embd, ("embed", "heads"), "c_attn")
    qkv_BxTxD = jnp.split(fused(x_BxTxD), 3, axis=-1)
    if number is not None:
      qkv_BxTxD[0] /= number.astype(qkv_BxTxD[0].dtype)
    scale = None if c.scale_attn_weights else 1.0
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (layers.in_heads(x, c.n_head) for x in qkv_BxTxD)
    y_BxTxHxK, kept = layers.attend_before(
      self, q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, tokens, kept, c.attn_pdrop, scale=scale
    )
    y_BxTxD = y_BxTxHxK.reshape(x_BxTxD.shape)
    y_BxTxD = self.dense(c.n_embd, ("heads", "embed"), "c_proj")(y_BxTxD)
    return nn.Dropout(c.resid_pdrop)(y_BxTxD, self.deterministic), kept


class Layer(Part[GPT2Config]):
  """One layer, in the form of nn.scan."""

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    tokens: jax.Array | Chunk,
    number: jax.Array | None = None,
    kept: KeyValues | None = None,
  ) -> tuple[jax.Array, KeyValues | None]:
    c, args = self.config, (self.config, self.dtype, self.deterministic)
    y_BxTxD = layers.Norm(c.layer_norm_epsilon, name="ln_1")(x_BxTxD)
    y_BxTxD, kept = Attention(*args, name="attn")(y_BxTxD, tokens, number, kept)
    x_BxTxD += soft.adapted(self, "attention", y_BxTxD)
    y_BxTxD = layers.Norm(c.layer_norm_epsilon, name="ln_2")(x_BxTxD)
    names, features = ("c_fc", "c_proj"), c.n_inner or 4 * c.n_embd
    feed = layers.MLP(
      *args, names, features, c.activation_function, c.resid_pdrop, name="mlp"
    )
    return x_BxTxD + soft.adapted(self, "mlp", feed(y_BxTxD)), kept


class LanguageModel(Model[GPT2Config]):
  """A decoder whose outputs score every token of the vocabulary as the next."""

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
    """Logits, BxTxV float32, or another readout; with a cache, these and the next one.

    Args:
      input_ids, attention_mask: BxT int32; the mask is 1 where a token is attended to,
        or the number of its segment, 1, 2, 3, …, that attends to itself alone.
      position_ids: BxT int32; by default they count from the first column, whatever the
        mask.
      cache: of the tokens before, to which these are added; the mask is then 1 where
        there is a token, and position_ids follow from it.
      deterministic: without dropout; otherwise a "dropout" rng is needed.
      readout: makes the outputs of the head and of what it takes.

    Raises:
      LoraxError: a text with more tokens than positions, or than the cache has.
    """
    c, dtype, args = self.config, self.dtype, (self.config, self.dtype, deterministic)
    check_length(input_ids, c.n_positions - soft.places(c.soft))
    words = self.table(c.vocab_size, c.n_embd, "wte", "vocab")
    positions = self.table(c.n_positions, c.n_embd, "wpe", "positions")
    before = soft.before(
      self, cache_layout(c), c.n_embd, attention_mask, position_ids, cache
    )
    position_ids, cache, each = before.position_ids, before.cache, dict(before.each)
    tokens: Any = before.mask_BxT
    if cache is not None:
      tokens = cache.chunk(before.mask_BxT, deterministic, position_ids)
      position_ids = tokens.positions_BxT
    elif position_ids is None:
      columns_T = jnp.arange(before.mask_BxT.shape[1], dtype=jnp.int32)
      position_ids = before.first + columns_T[None, :]
    x_BxTxD = before.put(words(input_ids).astype(dtype))
    x_BxTxD += positions(position_ids).astype(dtype)
    x_BxTxD = nn.Dropout(c.embd_pdrop)(x_BxTxD, deterministic)
    if c.scale_attn_by_inverse_layer_idx:
      each["number"] = jnp.arange(1, c.n_layer + 1, dtype=jnp.float32)
    x_BxTxD, kept = stacking.stack(
      self, Layer, args, c.n_layer, x_BxTxD, tokens, each=each
    )
    x_BxTxD = layers.Norm(c.layer_norm_epsilon, name="ln_f")(x_BxTxD)
    if c.tie_word_embeddings:
      head = heads.tied(words.embedding)
    else:
      std = c.initializer_range
      head = heads.Linear(c.vocab_size, std, name="lm_head")(c.n_embd)
    outputs = readout(head, before.cut(x_BxTxD))
    return outputs if cache is None else (outputs, cache.grown(kept, tokens))


# Names in a checkpoint

_LAYER = "layer_{i}"
_KEY = "h.{i}"
_HEAD = "lm_head.weight"

# Causal masks in old checkpoints, for each layer.
_MASKS = ("attn.bias", "attn.masked_bias")


# Heads of classifiers, of questions' spans and of multiple choice.
def _conv1d(path: str, key: str) -> Entries:
  """The entries of a transformers Conv1D: a linear layer whose weight is (in, out)."""
  kernel = Entry(f"{path}/kernel", f"{key}.weight")
  return kernel, Entry(f"{path}/bias", f"{key}.bias")


_ENTRIES = (
  embedding("wte", "wte"),
  embedding("wpe", "wpe"),
  *norm(f"{_LAYER}/ln_1", f"{_KEY}.ln_1"),
  *each(_conv1d, f"{_LAYER}/attn", f"{_KEY}.attn", ("c_attn", "c_proj")),
  *norm(f"{_LAYER}/ln_2", f"{_KEY}.ln_2"),
  *each(_conv1d, f"{_LAYER}/mlp", f"{_KEY}.mlp", ("c_fc", "c_proj")),
  *norm("ln_f", "ln_f"),
)


def keymap(c: GPT2Config, scan: bool) -> KeyMap:
  """The key map of a GPT-2; a tied head is its token embeddings."""
  head = linear("lm_head", "lm_head", bias=False, part="head")
  tied = c.tie_word_embeddings
  return KeyMap(
    family="gpt2",
    prefix="transformer.",
    entries=_ENTRIES if tied else (*_ENTRIES, *head),
    counts={"i": c.n_layer},
    scan=scan,
    anchor="wte.weight",
    buffers=tuple(f"h.{i}.{name}" for i in range(c.n_layer) for name in _MASKS),
    ties={_HEAD: "wte.weight"} if tied else {},
  )


def cache_layout(c: GPT2Config) -> Layout:
  """See `Family.cache`."""
  size = c.n_embd // c.n_head
  return Layout(c.n_head, size, (None,) * c.n_layer, max_length=c.n_positions)


FAMILIES = {
  "gpt2": Family(
    task="causal-lm",
    architecture="GPT2LMHeadModel",
    # reorder_and_upcast_attn is ignored: attention's softmax is always float32.
    configure=partial(
      fields.read, GPT2Config, aliases=_ALIASES, only={"add_cross_attention": False}
    ),
    build=LanguageModel,
    keymap=keymap,
    inputs=text_inputs,
    max_length=lambda config: config.n_positions,
    cache=cache_layout,
    soft=soft.PARTS,
    dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    shards_tokens=lambda config: True,
  )
}
