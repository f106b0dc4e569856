"""The shape of a T5, read from a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from lorax_flax.models import hf_config as fields
from lorax_flax.models import ops
from lorax_flax.models.soft import SoftSettings


@dataclasses.dataclass(frozen=True)
class T5Config:
  """T5's shape, under Hugging Face's field names.

  Attributes:
    d_kv: features of one head of attention.
    num_decoder_layers: None takes num_layers.
    relative_attention_max_distance: in tokens; larger distances share a bucket.
    dropout_rate: of every dropout, a probability in [0, 1).
    initializer_factor: of the standard deviation of fresh weights.
    feed_forward_proj: the MLP's activation, with the prefix "gated-" for a gated one.
    scale_decoder_outputs: v1.0's head: the token embeddings, its inputs scaled.
      Otherwise the head has weights of its own.
    untied_embeddings: encoder, decoder and head have a table each. A field of our own:
      transformers goes by the tables in the file.
    n_positions: maximal tokens of the texts in pretraining; longer ones are accepted.
    soft: trained states beside the weights; not in config.json.
  """

  vocab_size: fields.Size = 32128
  d_model: fields.Size = 512
  d_kv: fields.Size = 64
  d_ff: fields.Size = 2048
  num_layers: fields.Layers = 6
  num_decoder_layers: fields.Layers | None = None
  num_heads: fields.Size = 8
  relative_attention_num_buckets: Annotated[int, fields.at_least(4)] = 32
  relative_attention_max_distance: int = 128
  dropout_rate: fields.Rate = 0.1
  layer_norm_epsilon: fields.Positive = 1e-6
  initializer_factor: fields.Positive = 1.0
  feed_forward_proj: str = "relu"
  scale_decoder_outputs: bool = True
  untied_embeddings: bool = False
  n_positions: fields.Size = 512
  soft: SoftSettings | None = None

  def __post_init__(self):
    fields.check_fields(self)
    fields.check(
      "relative_attention_max_distance",
      self.relative_attention_max_distance,
      int,
      "more than half of relative_attention_num_buckets",
      lambda x: x > self.relative_attention_num_buckets // 2,
    )
    fields.check("feed_forward_proj", self.feed_forward_proj, str, "a name", bool)
    ops.activation(self.activation)

  @property
  def decoder_layers(self) -> int:
    """The number of layers of the decoder."""
    return self.num_decoder_layers or self.num_layers

  @property
  def gated(self) -> bool:
    """True where a second layer multiplies the activation's output."""
    return self.feed_forward_proj.startswith("gated-")

  @property
  def activation(self) -> str:
    """The MLP's activation; v1.1's GELU is the approximate one."""
    return _activation(self.feed_forward_proj)


def _activation(feed_forward_proj: str) -> str:
  name = feed_forward_proj.removeprefix("gated-")
  return "gelu_new" if feed_forward_proj == "gated-gelu" else name


_ALIASES = {
  "hidden_size": "d_model",
  "num_attention_heads": "num_heads",
  "num_hidden_layers": "num_layers",
  "head_dim": "d_kv",
}


def from_hf(hf_config: Mapping[str, Any], **overrides: Any) -> T5Config:
  """Reads a config.json that is already parsed; see `fields.read`."""
  projection = str(hf_config.get("feed_forward_proj") or "relu")
  only = {
    "dense_act_fn": _activation(projection),
    "is_decoder": False,
    "is_encoder_decoder": True,
    "is_gated_act": projection.startswith("gated-"),
  }
  # Without scale_decoder_outputs, transformers decides the head by this.
  scaled = hf_config.get("tie_word_embeddings") is not False
  defaults = {"scale_decoder_outputs": scaled}
  return fields.read(
    T5Config, hf_config, defaults=defaults, only=only, aliases=_ALIASES, **overrides
  )
