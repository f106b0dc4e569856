"""Key maps of the BERT family's sequence classifiers (see keymap.py)."""

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.hub.checkpoints.entries import embedding, linear, norm, weight_and_bias
from lorax_flax.hub.checkpoints.keymap import KeyMap

_BODY = (
  *(
    embedding(f"embeddings/{name}", f"embeddings.{name}")
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
  ),
  *norm("embeddings/layer_norm", "embeddings.LayerNorm"),
  *(
    entry
    for name in ("query", "key", "value")
    for entry in linear(
      f"encoder/layer_{{i}}/attention/{name}",
      f"encoder.layer.{{i}}.attention.self.{name}",
    )
  ),
  *linear(
    "encoder/layer_{i}/attention/output", "encoder.layer.{i}.attention.output.dense"
  ),
  *norm(
    "encoder/layer_{i}/attention/layer_norm",
    "encoder.layer.{i}.attention.output.LayerNorm",
  ),
  *linear("encoder/layer_{i}/intermediate", "encoder.layer.{i}.intermediate.dense"),
  *linear("encoder/layer_{i}/output", "encoder.layer.{i}.output.dense"),
  *norm("encoder/layer_{i}/layer_norm", "encoder.layer.{i}.output.LayerNorm"),
)

_BERT = (
  *_BODY,
  *linear("pooler", "pooler.dense"),
  *linear("classifier", "classifier", part="head", labels=True),
)

_ROBERTA = (
  *_BODY,
  *linear("classifier/dense", "classifier.dense", part="head"),
  *linear("classifier/out_proj", "classifier.out_proj", part="head", labels=True),
)

_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")

# Masked-language and next-sentence heads of pretraining; question answering's.
_BERT_OTHER = (
  "cls.predictions.bias",
  *weight_and_bias(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.seq_relationship",
    "qa_outputs",
  ),
)

# RoBERTa's sequence classifier has no pooler; a plain "classifier" is a head for
# tokens or for multiple choice.
_ROBERTA_OTHER = (
  "lm_head.bias",
  *weight_and_bias(
    "lm_head.dense",
    "lm_head.layer_norm",
    "lm_head.decoder",
    "pooler.dense",
    "classifier",
    "qa_outputs",
  ),
)

_TABLES = {
  "bert": ("bert.", _BERT, _BERT_OTHER, ("classifier", "pooler")),
  "roberta": ("roberta.", _ROBERTA, _ROBERTA_OTHER, ("classifier",)),
  "xlm-roberta": ("roberta.", _ROBERTA, _ROBERTA_OTHER, ("classifier",)),
}


def keymap(family: str, num_layers: int, scan: bool = False) -> KeyMap:
  """The key map of a "bert", "roberta" or "xlm-roberta" with `num_layers` layers."""
  if family not in _TABLES:
    raise LoraxError(unknown("family", family, _TABLES))
  prefix, entries, other_heads, head_groups = _TABLES[family]
  return KeyMap(
    family=family,
    prefix=prefix,
    entries=entries,
    counts={"i": num_layers},
    scan=scan,
    anchor="embeddings.word_embeddings.weight",
    buffers=_BUFFERS,
    other_heads=other_heads,
    head_groups=head_groups,
    # Checkpoints converted from TensorFlow (bert-base-uncased among them) name a
    # layer norm's scale and bias so.
    aliases=(
      (".LayerNorm.gamma", ".LayerNorm.weight"),
      (".LayerNorm.beta", ".LayerNorm.bias"),
    ),
  )
