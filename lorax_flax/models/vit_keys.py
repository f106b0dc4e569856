"""The key map of ViT's image classifier (see keymap.py)."""

from lorax_flax.hub.checkpoints.entries import CONV_2D, Entry, linear, norm
from lorax_flax.hub.checkpoints.keymap import KeyMap

_LAYER = "layer_{i}"
_KEY = "layers.{i}"

# Each layer's linear modules, as transformers and PEFT name them, and as files do.
_LINEAR = {
  "attention.q_proj": "attention.attention.query",
  "attention.k_proj": "attention.attention.key",
  "attention.v_proj": "attention.attention.value",
  "attention.o_proj": "attention.output.dense",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_NORMS = ("layernorm_before", "layernorm_after")
_ON_DISK = _LINEAR | {name: name for name in _NORMS}

# The encoder's pooler; the head that pretraining fills in masked patches with.
_OTHER = (
  "embeddings.mask_token",
  "pooler.dense.weight",
  "pooler.dense.bias",
  "decoder.0.weight",
  "decoder.0.bias",
)


def _entries(qkv_bias: bool) -> tuple[Entry, ...]:
  projection = "embeddings.patch_embeddings.projection"
  biased = {name: qkv_bias or not name.endswith(_QKV) for name in _LINEAR}
  return (
    Entry("embeddings/cls_token", "embeddings.cls_token"),
    Entry("embeddings/position_embeddings", "embeddings.position_embeddings"),
    Entry("embeddings/projection/kernel", f"{projection}.weight", CONV_2D),
    Entry("embeddings/projection/bias", f"{projection}.bias"),
    *(
      entry
      for name, has_bias in biased.items()
      for entry in linear(
        f"{_LAYER}/{name.replace('.', '/')}", f"{_KEY}.{name}", bias=has_bias
      )
    ),
    *(entry for name in _NORMS for entry in norm(f"{_LAYER}/{name}", f"{_KEY}.{name}")),
    *norm("layernorm", "layernorm"),
    *linear("classifier", "classifier", part="head"),
  )


def keymap(num_layers: int, qkv_bias: bool, scan: bool = False) -> KeyMap:
  """The key map of a ViT; with `qkv_bias`, query, key and value have biases."""
  return KeyMap(
    family="vit",
    prefix="vit.",
    entries=_entries(qkv_bias),
    counts={"i": num_layers},
    scan=scan,
    anchor="embeddings.cls_token",
    other_heads=_OTHER,
    on_disk={
      f"{_KEY}.{module}": f"encoder.layer.{{i}}.{old}"
      for module, old in _ON_DISK.items()
    },
  )
