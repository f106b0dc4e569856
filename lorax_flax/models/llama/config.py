"""The shape of a decoder: the differences of Llama and its variants, as data."""

import dataclasses

from lorax_flax.errors import LoraxError
from lorax_flax.models import hf_config as fields
from lorax_flax.models.cache import Layout
from lorax_flax.models.ops import Rope
from lorax_flax.models.soft import SoftSettings


@dataclasses.dataclass(frozen=True)
class NormKind:
  """A variant's RMS norm; see `ops.rms_norm`."""

  offset: float = 0.0
  late: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder with a language model's head.

  The first group has Hugging Face's field names; each variant lists those that its
  config.json sets. The second group is fixed by the variant.

  Attributes:
    num_key_value_heads: None takes num_attention_heads.
    head_dim: None takes hidden_size / num_attention_heads.
    attention_bias: of the projections of queries, keys and values.
    query_pre_attn_scalar: logits of attention are divided by its square root; None
      takes the head's size.
    attn_logit_softcapping, final_logit_softcapping: bounds of logits; None is none.
    resid_pdrop: dropout of the residual branches.
    num_experts: None: one feed-forward part, without a router.
    num_experts_per_tok: number of experts that a token is routed to.
    moe_intermediate_size: of an expert; None takes intermediate_size.
    norm_topk_prob: normalise the weights of the chosen experts to a sum of one.
    output_bias: of attention's output projection; None takes attention_bias.
    norm: kind of its norms.
    qk_norm: queries and keys are normed, head by head.
    outer_norms: outputs of attention and of the feed-forward part are normed as well.
    fused: one projection holds queries, keys and values, one holds gate and up.
    embed_scaled: embeddings are multiplied by the square root of hidden_size.
    windows: for each layer, the number of positions that a query attends to, its own
      included; None: all before it.
    ropes: the kinds of rotary positions.
    rope_of: for each layer, the index of its kind.
    soft: trained states beside the weights.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  model_type: str
  vocab_size: fields.Size
  hidden_size: fields.Size
  intermediate_size: fields.Size
  num_hidden_layers: fields.Layers
  num_attention_heads: fields.Size
  hidden_act: fields.Activation
  max_position_embeddings: fields.Size
  rms_norm_eps: fields.Positive
  tie_word_embeddings: bool
  num_key_value_heads: fields.Size | None = None
  head_dim: fields.Size | None = None
  initializer_range: fields.Positive = 0.02
  attention_dropout: fields.Rate = 0.0
  attention_bias: bool = False
  mlp_bias: bool = False
  query_pre_attn_scalar: fields.Positive | None = None
  attn_logit_softcapping: fields.Positive | None = None
  final_logit_softcapping: fields.Positive | None = None
  resid_pdrop: fields.Rate = 0.0
  num_experts: fields.Size | None = None
  num_experts_per_tok: fields.Size = 1
  moe_intermediate_size: fields.Size | None = None
  norm_topk_prob: bool = True

  output_bias: bool | None = None
  norm: NormKind = NormKind()
  qk_norm: bool = False
  outer_norms: bool = False
  fused: bool = False
  embed_scaled: bool = False
  windows: tuple[int | None, ...] = ()
  ropes: tuple[Rope, ...] = (Rope(),)
  rope_of: tuple[int, ...] = ()
  soft: SoftSettings | None = None

  def __post_init__(self):
    fields.check_fields(self)
    if self.head_dim is None:
      fields.check_multiple(self, "hidden_size", of="num_attention_heads")
    if self.num_attention_heads % self.kv_heads:
      raise LoraxError(
        f"config: num_attention_heads {self.num_attention_heads} is not a multiple of"
        f" num_key_value_heads {self.kv_heads}"
      )
    if self.num_experts and self.num_experts_per_tok > self.num_experts:
      raise LoraxError(
        f"config: num_experts_per_tok {self.num_experts_per_tok} of num_experts"
        f" {self.num_experts}"
      )
    if self.head_size % 2:
      raise LoraxError(f"config: head_dim must be even, not {self.head_size}")

  @property
  def head_size(self) -> int:
    """Features of one head."""
    return self.head_dim or self.hidden_size // self.num_attention_heads

  @property
  def kv_heads(self) -> int:
    """Heads of keys and values."""
    return self.num_key_value_heads or self.num_attention_heads

  @property
  def cache_layout(self) -> Layout:
    """The size of its cache."""
    return Layout(self.kv_heads, self.head_size, self.windows)

  @property
  def expert_size(self) -> int:
    """Features inside one expert."""
    return self.moe_intermediate_size or self.intermediate_size

  @property
  def has_output_bias(self) -> bool:
    """True where attention's output projection has a bias."""
    return self.attention_bias if self.output_bias is None else self.output_bias

  @property
  def attention_scale(self) -> float:
    """The factor of attention's logits."""
    return float(self.query_pre_attn_scalar or self.head_size) ** -0.5

  @property
  def windows_differ(self) -> bool:
    """True where layers have different windows."""
    return len(set(self.windows)) > 1

  @property
  def ropes_differ(self) -> bool:
    """True where layers have different kinds of rotary positions."""
    return len(self.ropes) > 1

  @property
  def attention_names(self) -> dict[str, int]:
    """Attention's projections of its input, and their numbers of heads."""
    h, g = self.num_attention_heads, self.kv_heads
    return (
      {"qkv_proj": h + 2 * g} if self.fused else {"q_proj": h, "k_proj": g, "v_proj": g}
    )

  @property
  def mlp_names(self) -> dict[str, int]:
    """The feed-forward part's projections of its input, and their features."""
    m = self.intermediate_size
    return {"gate_up_proj": 2 * m} if self.fused else {"gate_proj": m, "up_proj": m}

  @property
  def layer_norms(self) -> tuple[str, ...]:
    """The norms before and after attention and the feed-forward part; "" for none."""
    if not self.outer_norms:
      return "input_layernorm", "", "post_attention_layernorm", ""
    return (
      "input_layernorm",
      "post_attention_layernorm",
      "pre_feedforward_layernorm",
      "post_feedforward_layernorm",
    )
