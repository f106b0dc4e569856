"""The key map of T5 for conditional generation (see keymap.py)."""

from lorax_flax.hub.checkpoints.entries import (
  Entries,
  each,
  embedding,
  linear,
  norm,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.models.t5.config import T5Config

_RELATIVE = "relative_attention_bias"

_HEAD, _SHARED = "lm_head.weight", "shared.weight"

# Copies of the table `shared`.
_REPEATS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# The tables of an encoder and a decoder that share none.
_OWN_TABLES = tuple(
  embedding(f"{name}_embed_tokens", f"{name}.embed_tokens")
  for name in ("encoder", "decoder")
)

# An unused table of relative positions that cross-attention has in old checkpoints.
_UNUSED = (f"decoder.block.0.layer.1.EncDecAttention.{_RELATIVE}.weight",)


def _sublayer(path: str, name: str, key: str, module: str, linears) -> Entries:
  """The entries of a norm, and of the linear layers that take its output."""
  return (
    *norm(f"{path}/{name}_norm", f"{key}.layer_norm", bias=False),
    *each(linear, f"{path}/{name}", f"{key}.{module}", linears, bias=False),
  )


def _stack(name: str, i: str, sublayers) -> Entries:
  """The entries of the encoder or the decoder, whose layers' placeholder is `i`."""
  first = f"{name}.block.0.layer.0.SelfAttention"
  return (
    embedding(f"{name}/relative_bias", f"{first}.{_RELATIVE}"),
    *(
      entry
      for number, (path, module, linears) in enumerate(sublayers)
      for entry in _sublayer(
        f"{name}/layer_{{{i}}}",
        path,
        f"{name}.block.{{{i}}}.layer.{number}",
        module,
        linears,
      )
    ),
    *norm(f"{name}/norm", f"{name}.final_layer_norm", bias=False),
  )


def keymap(c: T5Config, scan: bool) -> KeyMap:
  """The key map of a T5."""
  up, tied = ("wi_0", "wi_1") if c.gated else ("wi",), c.scale_decoder_outputs
  untied = c.untied_embeddings
  attend = ("attention", "SelfAttention", tuple("qkvo"))
  cross = ("cross_attention", "EncDecAttention", tuple("qkvo"))
  mlp = ("mlp", "DenseReluDense", (*up, "wo"))
  head = linear("lm_head", "lm_head", bias=False, part="head")
  return KeyMap(
    family="t5",
    prefix="",
    entries=(
      *(_OWN_TABLES if untied else (embedding("shared", "shared"),)),
      *_stack("encoder", "i", (attend, mlp)),
      *_stack("decoder", "j", (attend, cross, mlp)),
      *(head if untied or not tied else ()),
    ),
    counts={"i": c.num_layers, "j": c.decoder_layers},
    scan=scan,
    anchor="encoder.final_layer_norm.weight",
    buffers=(*_UNUSED, *((_SHARED,) if untied else ())),
    ties={} if untied else dict.fromkeys((*_REPEATS, *((_HEAD,) * tied)), _SHARED),
    unused=_SHARED,
    # transformers 5 sets tie_word_embeddings for every T5.
    taken_for_tied=None if tied else _HEAD,
  )
