"""The key map of DeBERTa-v2's sequence classifier (see keymap.py)."""

from collections.abc import Mapping

from lorax_flax.hub.checkpoints.entries import (
  CONV_1D,
  Entry,
  embedding,
  linear,
  norm,
  weight_and_bias,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.models.bert.keys import encoder_layer
from lorax_flax.models.deberta.config import DebertaConfig


def _projection(name: str) -> tuple[Entry, ...]:
  path, key = "encoder/layer_{i}/attention", "encoder.layer.{i}.attention.self"
  return linear(f"{path}/{name}", f"{key}.{name}")


def _table(name: str) -> tuple[Entry, ...]:
  return (embedding(f"embeddings/{name}", f"embeddings.{name}"),)


_ENTRIES = (
  *_table("word_embeddings"),
  *norm("embeddings/layer_norm", "embeddings.LayerNorm"),
  *encoder_layer("query_proj", "key_proj", "value_proj"),
  *linear("pooler", "pooler.dense", part="head"),
  *linear("classifier", "classifier", part="head", labels=True),
)

# Modules that only some models have.
OPTIONAL: Mapping[str, tuple[Entry, ...]] = {
  "position_embeddings": _table("position_embeddings"),
  "token_type_embeddings": _table("token_type_embeddings"),
  "embed_proj": linear("embeddings/embed_proj", "embeddings.embed_proj", bias=False),
  "rel_embeddings": (embedding("encoder/rel_embeddings", "encoder.rel_embeddings"),),
  "rel_norm": norm("encoder/rel_norm", "encoder.LayerNorm"),
  "pos_key_proj": _projection("pos_key_proj"),
  "pos_query_proj": _projection("pos_query_proj"),
  "conv": (
    Entry("encoder/conv/conv/kernel", "encoder.conv.conv.weight", CONV_1D),
    Entry("encoder/conv/conv/bias", "encoder.conv.conv.bias"),
    *norm("encoder/conv/layer_norm", "encoder.conv.LayerNorm"),
  ),
}

# Pretraining's heads: v2's masked-language head in transformers' older form and in its
# own, v3's discriminator; question answering's.
_OTHER = (
  "cls.predictions.bias",
  "lm_predictions.lm_head.bias",
  *weight_and_bias(
    "cls.predictions.decoder",
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "lm_predictions.lm_head.dense",
    "lm_predictions.lm_head.LayerNorm",
    "mask_predictions.dense",
    "mask_predictions.LayerNorm",
    "mask_predictions.classifier",
    "qa_outputs",
  ),
)
# The published checkpoints have a table of absolute positions that no layer uses.
_POSITIONS = "embeddings.position_embeddings.weight"


def keymap(c: DebertaConfig, scan: bool) -> KeyMap:
  """The key map of a DeBERTa-v2."""
  chosen = (entries for name, entries in OPTIONAL.items() if name in c.optional)
  unused = () if c.position_biased_input else (_POSITIONS,)
  return KeyMap(
    family="deberta-v2",
    prefix="deberta.",
    entries=(*_ENTRIES, *(entry for entries in chosen for entry in entries)),
    counts={"i": c.num_hidden_layers},
    scan=scan,
    anchor="embeddings.word_embeddings.weight",
    buffers=("embeddings.position_ids", *unused),
    other_heads=_OTHER,
    head_groups=("pooler", "classifier"),
  )
