"""The key map of DistilBERT's sequence classifier (see keymap.py)."""

from lorax_flax.hub.checkpoints.entries import embedding, linear, norm
from lorax_flax.hub.checkpoints.keymap import KeyMap

_LAYER = "transformer/layer_{i}"
_KEY = "transformer.layer.{i}"

_ENTRIES = (
  embedding("embeddings/word_embeddings", "embeddings.word_embeddings"),
  embedding("embeddings/position_embeddings", "embeddings.position_embeddings"),
  *norm("embeddings/layer_norm", "embeddings.LayerNorm"),
  *(
    entry
    for name in ("q_lin", "k_lin", "v_lin", "out_lin")
    for entry in linear(f"{_LAYER}/attention/{name}", f"{_KEY}.attention.{name}")
  ),
  *norm(f"{_LAYER}/sa_layer_norm", f"{_KEY}.sa_layer_norm"),
  *linear(f"{_LAYER}/ffn/lin1", f"{_KEY}.ffn.lin1"),
  *linear(f"{_LAYER}/ffn/lin2", f"{_KEY}.ffn.lin2"),
  *norm(f"{_LAYER}/output_layer_norm", f"{_KEY}.output_layer_norm"),
  *linear("pre_classifier", "pre_classifier", part="head"),
  *linear("classifier", "classifier", part="head"),
)

# The masked-language head of pretraining; question answering's.
_OTHER = tuple(
  f"{module}.{name}"
  for module in ("vocab_transform", "vocab_layer_norm", "vocab_projector", "qa_outputs")
  for name in ("weight", "bias")
)


def keymap(num_layers: int, scan: bool = False) -> KeyMap:
  """The key map of a DistilBERT with `num_layers` layers."""
  return KeyMap(
    family="distilbert",
    prefix="distilbert.",
    entries=_ENTRIES,
    counts={"i": num_layers},
    scan=scan,
    anchor="embeddings.word_embeddings.weight",
    buffers=("embeddings.position_ids",),
    other_heads=_OTHER,
    head_groups=("pre_classifier", "classifier"),
  )
