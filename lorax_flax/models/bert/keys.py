"""Key maps of the BERT family's sequence classifiers (see keymap.py)."""

from lorax_flax.errors import check_known
from lorax_flax.hub.checkpoints.entries import (
  Entries,
  each,
  embedding,
  linear,
  norm,
  weight_and_bias,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap


def encoder_layer(*projections: str) -> Entries:
  """The entries of a layer as BERT has it, and DeBERTa with other projections."""
  path, key = "encoder/layer_{i}", "encoder.layer.{i}"
  return (
    *each(linear, f"{path}/attention", f"{key}.attention.self", projections),
    *linear(f"{path}/attention/output", f"{key}.attention.output.dense"),
    *norm(f"{path}/attention/layer_norm", f"{key}.attention.output.LayerNorm"),
    *linear(f"{path}/intermediate", f"{key}.intermediate.dense"),
    *linear(f"{path}/output", f"{key}.output.dense"),
    *norm(f"{path}/layer_norm", f"{key}.output.LayerNorm"),
  )


_BODY = (
  *(
    embedding(f"embeddings/{name}", f"embeddings.{name}")
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
  ),
  *norm("embeddings/layer_norm", "embeddings.LayerNorm"),
  *encoder_layer("query", "key", "value"),
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
  check_known("family", family, _TABLES)
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
