"""The shape of a DeBERTa-v2 or v3, read from a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.models import hf_config as fields
from lorax_flax.models import ops
from lorax_flax.models.soft import SoftSettings

# Fields that change the numbers, with the one value that is supported.
_ONLY = {"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False}

# The terms of attention with positions: content to position, and the converse.
POSITION_TERMS = ("c2p", "p2c")
_NORMS = ("layer_norm",)


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
  """DeBERTa's shape, under Hugging Face's field names.

  Attributes:
    relative_attention: attention depends on the distance of two tokens.
    max_relative_positions: the distance from which all share a row; below 1 it is
      max_position_embeddings.
    position_buckets: number of rows of the table on each side, large distances on a
      logarithmic scale; below 1 each distance has its own.
    pos_att_type: the terms with positions, of `POSITION_TERMS`.
    share_att_key: the table is projected by the queries' and keys' own projections.
    norm_rel_ebd: ("layer_norm",) where the table is normed, or ().
    position_biased_input: the input has absolute positions too.
    embedding_size: None takes hidden_size.
    conv_kernel_size: of a convolution beside the first layer; 0 for none.
    cls_dropout: before the classifier; None takes hidden_dropout_prob.
    num_labels: width of the classifier's output; 1 for regression.
    soft: trained states beside the weights; not in config.json.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  vocab_size: fields.Size = 128100
  hidden_size: fields.Size = 1536
  num_hidden_layers: fields.Layers = 24
  num_attention_heads: fields.Size = 24
  intermediate_size: fields.Size = 6144
  hidden_act: fields.Activation = "gelu"
  hidden_dropout_prob: fields.Rate = 0.1
  attention_probs_dropout_prob: fields.Rate = 0.1
  max_position_embeddings: fields.Size = 512
  type_vocab_size: Annotated[int, fields.at_least(0)] = 0
  initializer_range: fields.Positive = 0.02
  layer_norm_eps: fields.Positive = 1e-7
  relative_attention: bool = False
  max_relative_positions: Annotated[int, fields.at_least(-1)] = -1
  position_buckets: Annotated[int, fields.at_least(-1)] = -1
  pos_att_type: tuple[str, ...] = ()
  share_att_key: bool = False
  norm_rel_ebd: tuple[str, ...] = ()
  position_biased_input: bool = True
  embedding_size: fields.Size | None = None
  conv_kernel_size: Annotated[int, fields.at_least(0)] = 0
  conv_groups: fields.Size = 1
  conv_act: str = "tanh"
  pooler_dropout: fields.Rate = 0.0
  pooler_hidden_act: fields.Activation = "gelu"
  cls_dropout: fields.Rate | None = None
  num_labels: fields.Size = 2
  soft: SoftSettings | None = None

  def __post_init__(self):
    fields.check_fields(self)
    fields.check_multiple(self, "hidden_size", of="num_attention_heads")
    if self.conv_kernel_size:
      fields.check("conv_act", self.conv_act, str, "a name", ops.activation)
      fields.check_multiple(self, "hidden_size", of="conv_groups")
      odd = lambda size: size % 2
      fields.check("conv_kernel_size", self.conv_kernel_size, int, "odd, or 0", odd)
    if self.norm_rel_ebd and not self.relative_attention:
      raise LoraxError("config: norm_rel_ebd without relative_attention norms nothing")
    if self.relative_attention and self.position_buckets > 0:
      least = self.position_buckets // 2 + 1
      if self.position_buckets < 2 or self.max_distance <= least:
        raise LoraxError(
          f"config: position_buckets {self.position_buckets} must be 2 at least, and "
          f"max_relative_positions, {self.max_distance}, more than half of it and one"
        )

  @property
  def head_size(self) -> int:
    """Features of one attention head."""
    return self.hidden_size // self.num_attention_heads

  @property
  def head_dropout(self) -> float:
    """Dropout rate before the classifier."""
    return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout

  @property
  def embedded(self) -> int:
    """Features of the tables of embeddings."""
    return self.hidden_size if self.embedding_size is None else self.embedding_size

  @property
  def max_distance(self) -> int:
    """The distance from which all share a row."""
    if self.max_relative_positions < 1:
      return self.max_position_embeddings
    return self.max_relative_positions

  @property
  def span(self) -> int:
    """Rows of the table of relative positions on each side."""
    return self.position_buckets if self.position_buckets > 0 else self.max_distance

  @property
  def terms(self) -> tuple[str, ...]:
    """The terms of attention with positions."""
    return self.pos_att_type if self.relative_attention else ()

  @property
  def optional(self) -> frozenset[str]:
    """The modules of `keys.OPTIONAL` that this model has."""
    own = set() if self.share_att_key else {*self.terms}
    has = {
      "position_embeddings": self.position_biased_input,
      "token_type_embeddings": self.type_vocab_size > 0,
      "embed_proj": self.embedded != self.hidden_size,
      "rel_embeddings": self.relative_attention,
      "rel_norm": bool(self.norm_rel_ebd),
      "pos_key_proj": "c2p" in own,
      "pos_query_proj": "p2c" in own,
      "conv": self.conv_kernel_size > 0,
    }
    return frozenset(name for name, present in has.items() if present)


def from_hf(hf_config: Mapping[str, Any], **overrides: Any) -> DebertaConfig:
  """Reads a config.json that is already parsed; see `fields.read`."""
  terms = _words("pos_att_type", hf_config, POSITION_TERMS)
  norms = _words("norm_rel_ebd", hf_config, _NORMS)
  named = {**hf_config, "pos_att_type": terms, "norm_rel_ebd": norms}
  config = fields.read(DebertaConfig, named, only=_ONLY, **overrides)
  only = {
    "attention_head_size": config.head_size,
    "pooler_hidden_size": config.hidden_size,
  }
  for name, value in only.items():
    found = hf_config.get(name, value)
    fields.check(name, found, int, f"{value} in this model", value.__eq__)
  return config


def _words(
  name: str, hf_config: Mapping[str, Any], known: Sequence[str]
) -> tuple[str, ...]:
  """A field that holds "a|b", or a list of words; in the order of `known`."""
  value = hf_config.get(name)
  if value is None:
    return ()
  words = value
  if isinstance(value, str):
    words = [word.strip() for word in value.lower().split("|")]
  if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
    raise LoraxError(f"config: {name} must be names joined by |, not {value!r}")
  words = [word for word in words if word not in ("", "none")]
  for word in words:
    if word not in known:
      raise LoraxError(f"config: {unknown(name, word, known)}")
  return tuple(word for word in known if word in words)
