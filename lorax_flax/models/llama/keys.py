"""The key map of Llama and its variants (see keymap.py)."""

import dataclasses
from collections.abc import Mapping

from lorax_flax.hub.checkpoints.entries import (
  LINEAR,
  Entry,
  each,
  embedding,
  linear,
  norm,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.models.llama.config import DecoderConfig

_LAYER = "model/layer_{i}"
_KEY = "layers.{i}"


def _linears(part: str, biased: Mapping[str, bool]) -> list[Entry]:
  return [
    entry
    for name, bias in biased.items()
    for entry in linear(f"{_LAYER}/{part}/{name}", f"{_KEY}.{part}.{name}", bias=bias)
  ]


_MIXTURE = f"{_LAYER}/mlp"

# transformers' modules: the router, and all experts of a layer in one tensor.
_EXPERTS = (
  Entry(f"{_MIXTURE}/gate/weight", f"{_KEY}.mlp.gate.weight", LINEAR),
  *(
    Entry(f"{_MIXTURE}/experts/{name}", f"{_KEY}.mlp.experts.{name}", (0, 2, 1))
    for name in ("gate_up_proj", "down_proj")
  ),
)


def _split(module: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
  """Entries of files with a tensor for each matrix of each expert."""
  expert = f"{_KEY}.{module}.experts.{{e}}"
  gate_up = f"{_MIXTURE}/experts/gate_up_proj"
  return (
    Entry(f"{_MIXTURE}/gate/weight", f"{_KEY}.{module}.gate.weight", LINEAR),
    Entry(gate_up, f"{expert}.{gate}.weight", LINEAR, piece=(0, 2)),
    Entry(gate_up, f"{expert}.{up}.weight", LINEAR, piece=(1, 2)),
    Entry(f"{_MIXTURE}/experts/down_proj", f"{expert}.{down}.weight", LINEAR),
  )


_SPLIT = {
  "mixtral": _split("block_sparse_moe", "w1", "w3", "w2"),
  "qwen3_moe": _split("mlp", "gate_proj", "up_proj", "down_proj"),
}


def keymap(c: DecoderConfig, scan: bool) -> KeyMap:
  """The key map of a decoder; a tied head is the token embeddings."""
  count, tied = c.num_hidden_layers, c.tie_word_embeddings
  attention = dict.fromkeys(c.attention_names, c.attention_bias)
  mlp = dict.fromkeys([*c.mlp_names, "down_proj"], c.mlp_bias)
  head_norms = ("q_norm", "k_norm") if c.qk_norm else ()
  entries = (
    embedding("model/embed_tokens", "embed_tokens"),
    *_linears("self_attn", {**attention, "o_proj": c.has_output_bias}),
    *each(norm, f"{_LAYER}/self_attn", f"{_KEY}.self_attn", head_norms, bias=False),
    *(_EXPERTS if c.num_experts else _linears("mlp", mlp)),
    *each(norm, _LAYER, _KEY, filter(None, c.layer_norms), bias=False),
    *norm("model/norm", "norm", bias=False),
    *(() if tied else linear("lm_head", "lm_head", part="head", bias=False)),
  )
  found = KeyMap(
    family=c.model_type,
    prefix="model.",
    entries=entries,
    counts={"i": count},
    scan=scan,
    anchor="embed_tokens.weight",
    # Old checkpoints have the angles' frequencies.
    buffers=tuple(f"layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(count)),
    ties={"lm_head.weight": "embed_tokens.weight"} if tied else {},
  )
  if not c.num_experts:
    return found
  split = tuple(e for e in entries if e not in _EXPERTS) + _SPLIT[c.model_type]
  counts = {**found.counts, "e": c.num_experts}
  return dataclasses.replace(
    found, other_form=dataclasses.replace(found, entries=split, counts=counts)
  )
