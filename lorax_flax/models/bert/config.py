"""The shape of an encoder, read from a Hugging Face config.json."""

import dataclasses

from lorax_flax.models import hf_config as fields
from lorax_flax.models.soft import SoftSettings

# Fields that change the numbers, with the one value that is supported.
UNSUPPORTED = {
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """A BERT or RoBERTa encoder with a classifier, under Hugging Face's field names.

  Attributes:
    model_type: "bert", "roberta" or "xlm-roberta".
    num_labels: width of the classifier's output; 1 for regression.
    classifier_dropout: None takes hidden_dropout_prob.
    soft: trained states beside the weights; not in config.json.
    The dropouts are probabilities in [0, 1); initializer_range is a standard deviation.
  """

  model_type: str
  vocab_size: fields.Size
  hidden_size: fields.Size
  num_hidden_layers: fields.Layers
  num_attention_heads: fields.Size
  intermediate_size: fields.Size
  pad_token_id: int
  hidden_act: fields.Activation = "gelu"
  hidden_dropout_prob: fields.Rate = 0.1
  attention_probs_dropout_prob: fields.Rate = 0.1
  classifier_dropout: fields.Rate | None = None
  max_position_embeddings: fields.Size = 512
  type_vocab_size: fields.Size = 2
  initializer_range: fields.Positive = 0.02
  layer_norm_eps: fields.Positive = 1e-12
  num_labels: fields.Size = 2
  soft: SoftSettings | None = None

  def __post_init__(self):
    fields.check_fields(self)
    fields.check_token(self, "pad_token_id")
    fields.check_multiple(self, "hidden_size", of="num_attention_heads")

  @property
  def head_dropout(self) -> float:
    """Dropout rate of the classification head."""
    if self.classifier_dropout is None:
      return self.hidden_dropout_prob
    return self.classifier_dropout
