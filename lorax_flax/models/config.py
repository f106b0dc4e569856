"""The shape of an encoder, read from a Hugging Face config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.models import ops

# What would change the numbers if it were set otherwise, and that we do not compute.
_ONLY = {
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
  "pruned_heads": {},
  "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """A BERT or RoBERTa encoder with a classifier, under Hugging Face's field names.

  Attributes:
    model_type: "bert", "roberta" or "xlm-roberta".
    num_labels: width of the classifier's output; 1 for regression.
    classifier_dropout: None takes hidden_dropout_prob.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  model_type: str
  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  pad_token_id: int
  hidden_act: str = "gelu"
  hidden_dropout_prob: float = 0.1
  attention_probs_dropout_prob: float = 0.1
  classifier_dropout: float | None = None
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  initializer_range: float = 0.02
  layer_norm_eps: float = 1e-12
  num_labels: int = 2

  def __post_init__(self):
    # Bounded, so that a damaged file is an error at once and not a loop for hours.
    layers = self.num_hidden_layers
    _check("num_hidden_layers", layers, int, "from 1 to 1000", lambda x: 1 <= x <= 1000)
    for name in (
      "vocab_size",
      "hidden_size",
      "num_attention_heads",
      "intermediate_size",
      "max_position_embeddings",
      "type_vocab_size",
      "num_labels",
    ):
      value = getattr(self, name)
      _check(name, value, int, "a positive integer", lambda x: 0 < x < 2**31)
    _check(
      "pad_token_id",
      self.pad_token_id,
      int,
      f"a token id below vocab_size, {self.vocab_size}",
      lambda x: 0 <= x < self.vocab_size,
    )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
      _check(name, getattr(self, name), float, "in [0, 1)", lambda x: 0 <= x < 1)
    if self.classifier_dropout is not None:
      rate = self.classifier_dropout
      _check("classifier_dropout", rate, float, "in [0, 1)", lambda x: 0 <= x < 1)
    for name in ("initializer_range", "layer_norm_eps"):
      _check(name, getattr(self, name), float, "a positive number", lambda x: x > 0)
    if self.hidden_size % self.num_attention_heads:
      raise LoraxError(
        f"config: hidden_size {self.hidden_size} is not a multiple of "
        f"num_attention_heads {self.num_attention_heads}"
      )
    _check("hidden_act", self.hidden_act, str, "a name", bool)
    ops.activation(self.hidden_act)

  @property
  def head_size(self) -> int:
    """Features of one attention head."""
    return self.hidden_size // self.num_attention_heads

  @property
  def head_dropout(self) -> float:
    """Dropout rate of the classification head."""
    if self.classifier_dropout is None:
      return self.hidden_dropout_prob
    return self.classifier_dropout


def from_hf(
  hf_config: Mapping[str, Any], defaults: Mapping[str, Any], **overrides: Any
) -> EncoderConfig:
  """Reads a config.json that is already parsed.

  Args:
    hf_config: the JSON object. Fields without an effect on the numbers are left alone.
    defaults: of the family, for fields that config.json leaves out.
    **overrides: fields that the caller decides (num_labels).

  Raises:
    LoraxError: a field we cannot honour, one of a wrong type, or a missing one.
  """
  for name, only in _ONLY.items():
    value = hf_config.get(name, only)
    if value != only and value is not None:
      raise LoraxError(
        f"config: {name}={value!r} is not supported, only {only!r} is; this encoder "
        "would not compute what the checkpoint was trained for"
      )
  fields = [field.name for field in dataclasses.fields(EncoderConfig)]
  values = dict(defaults)
  # An explicit null means the default, except where null is a value of its own.
  values |= {k: hf_config[k] for k in fields if hf_config.get(k) is not None}
  labels = labels_in(hf_config)
  if labels is not None:
    values["num_labels"] = labels
  values |= overrides
  required = [f.name for f in dataclasses.fields(EncoderConfig) if f.default is _NONE]
  missing = [name for name in required if name not in values]
  if missing:
    raise LoraxError(f"config: missing {', '.join(missing)}")
  return EncoderConfig(**values)


_NONE = dataclasses.MISSING


def labels_in(hf_config: Mapping[str, Any]) -> int | None:
  """How many labels a config.json declares, by id2label or num_labels, or None."""
  names = hf_config.get("id2label")
  if names is None:
    return hf_config.get("num_labels")
  if not isinstance(names, Mapping):
    raise LoraxError(f"config: id2label must be an object, not {names!r}")
  return len(names)


def _check(name: str, value: Any, kind: type, says: str, good: Any) -> None:
  """Raises LoraxError unless `value` is a `kind` (ints pass for floats) and good."""
  kinds = (int, float) if kind is float else kind
  typed = isinstance(value, kinds) and not isinstance(value, bool)
  if typed and kind is float:
    typed = math.isfinite(value)
  if not typed or not good(value):
    raise LoraxError(f"config: {name} must be {says}, not {value!r}")
