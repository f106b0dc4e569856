"""llama.cpp's architectures: names, metadata and forms of tensors, read and written.

Each is one declaration, which the reader of models, their writer and LoRA adapters take
alike. Source: llama.cpp's convert_hf_to_gguf.py and its src/llama-model.cpp.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lorax_flax.errors import LoraxError, unknown

_LAYER = "blk.{i}."
_OPTIONAL = {
  "attention.head_count_kv": None,
  "attention.key_length": None,
  "rope.freq_base": 10000.0,
}


class TensorForm(NamedTuple):
  """The form that a tensor has in a file, beside Hugging Face's.

  Attributes:
    heads: number of heads whose rows are permuted: rotary positions pair neighbouring
      features in the file, and the two halves of a head in Hugging Face's order; None:
      rows as they are.
    offset: added to the numbers.
    transposed: rows and columns are swapped.
  """

  heads: int | None = None
  offset: float = 0.0
  transposed: bool = False

  def row_order(self, count: int) -> np.ndarray:
    """The row of Hugging Face's for each of a file's rows."""
    order = np.arange(count)
    if self.heads is None:
      return order
    return order.reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)

  def to_file(self, value: np.ndarray) -> np.ndarray:
    """A tensor of Hugging Face's as the file has it."""
    if self.offset:
      value = value.astype(np.float32) + np.float32(self.offset)
    value = value.T if self.transposed else value
    return value if self.heads is None else value[self.row_order(len(value))]


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One of llama.cpp's architectures.

  Attributes:
    name: the file's general.architecture.
    fields: of config.json, which the file does not have: the only values that there
      are.
    modules: a file's names of modules, {i} being the layer, to Hugging Face's.
    metadata: the file's names of numbers, less "NAME.", to fields of config.json.
    optional: of these, what a file may lack, and the value that it has then.
    families: further model_types that are written as this one.
    interleaved: rows of queries and keys are permuted; see `TensorForm`.
    norm_offset: added to the scale of each norm.
    transposed: modules whose matrices Hugging Face has the other way round.
    biases: flags of config.json for biases, and for each a tensor that exists then.
    full_every: of so many layers the last attends to all positions, the others to
      a window; 0: all have it; None: no layer has one.
    rope_tensors: factors of the rotary positions' wavelengths, one for each pair of
      features, which some models have: of all texts, or of short and of long ones.
    partial_rope: the first of a head's features may be rotated alone.
    width_scaled: number of layers of the one size whose attention is scaled by
      hidden_size / num_attention_heads and not by the size of a head.
  """

  name: str
  fields: Mapping[str, Any]
  modules: Mapping[str, str]
  metadata: Mapping[str, str]
  optional: Mapping[str, Any] = dataclasses.field(default_factory=lambda: _OPTIONAL)
  families: tuple[str, ...] = ()
  interleaved: bool = False
  norm_offset: float = 0.0
  transposed: tuple[str, ...] = ()
  biases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  full_every: int | None = None
  rope_tensors: tuple[str, ...] = ()
  partial_rope: bool = False
  width_scaled: int | None = None

  @property
  def model_types(self) -> tuple[str, ...]:
    """Families of config.json that are written as this architecture."""
    return (self.fields["model_type"], *self.families)

  def hf_name(self, name: str) -> tuple[str, str]:
    """A tensor's module in the file, and its key in Hugging Face's checkpoint.

    "blk.3.attn_q.weight" gives ("attn_q", "model.layers.3.self_attn.q_proj.weight").
    Unknown name: LoraxError.
    """
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,3})\.)?(\w+)\.(weight|bias)", name)
    if match is not None:
      layer, module, part = match.groups()
      generic = module if layer is None else _LAYER + module
      if generic in self.modules:
        return module, f"{self.modules[generic].format(i=layer)}.{part}"
    known = [f"{module.replace('{i}', 'N')}.weight" for module in self.modules]
    raise LoraxError(unknown("tensor", name, known))

  def file_name(self, key: str) -> tuple[str, str]:
    """The inverse of `hf_name`: a tensor's module in the file, and its name there."""
    module, _, part = key.rpartition(".")
    layer = re.search(r"\.(\d+)\.", module)
    generic = re.sub(r"\.\d+\.", ".{i}.", module, count=1)
    names = {theirs: name for name, theirs in self.modules.items()}
    if generic not in names:
      raise LoraxError(
        f"llama.cpp's {self.name}: " + unknown("module", module, self.modules.values())
      )
    name = names[generic]
    found = name if layer is None else name.format(i=layer[1])
    return name.removeprefix(_LAYER), f"{found}.{part}"

  def form(self, module: str, config: Mapping[str, Any], axes: int) -> TensorForm:
    """The form of a module's tensors.

    Args:
      module: in the file, without its layer.
      config: fields of config.json.
      axes: number of axes: 2 of a matrix, 1 of a bias or a norm's scale.
    """
    turned = self.interleaved and module in _HEADS
    return TensorForm(
      config[_HEADS[module]] if turned else None,
      self.norm_offset if module.endswith("_norm") else 0.0,
      axes == 2 and module in self.transposed,
    )

  def attention_scalar(self, layers: int, heads: int, width: int, head: int) -> int:
    """The number by whose square root attention's logits are divided."""
    return width // heads if layers == self.width_scaled else head


_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def _modules(layers: Mapping[str, str]) -> dict[str, str]:
  """Modules of a decoder, those of its layers being these."""
  outside = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
  }
  return outside | {
    _LAYER + name: f"model.layers.{{i}}.{module}" for name, module in layers.items()
  }


_LLAMA = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTER_NORMS = {
  **_LLAMA,
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {
  "attn_norm": "input_layernorm",
  "attn_qkv": "self_attn.qkv_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_up": "mlp.gate_up_proj",
  "ffn_down": "mlp.down_proj",
}
_GPT2 = {
  "token_embd": "transformer.wte",
  "position_embd": "transformer.wpe",
  "output_norm": "transformer.ln_f",
  "output": "lm_head",
  "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
  "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
  "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
  "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
  "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
  "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
}

_NUMBERS = {
  "block_count": "num_hidden_layers",
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "context_length": "max_position_embeddings",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "rope.freq_base": "rope_theta",
}
_WINDOWED = {**_NUMBERS, "attention.sliding_window": "sliding_window"}
_FINAL_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_ATTENTION_CAP = {"attn_logit_softcapping": "attn_logit_softcapping"}


def _fields(model_type: str, architecture: str, **rest: Any) -> dict[str, Any]:
  return {"model_type": model_type, "architectures": [architecture], **rest}


_SILU = {"hidden_act": "silu"}
_GEMMA = {
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "attention_bias": False,
}


def _without_head(modules: Mapping[str, str]) -> dict[str, str]:
  """These modules of an architecture whose head is always the token embeddings."""
  return {name: module for name, module in modules.items() if name != "output"}


ARCHITECTURES: Mapping[str, Architecture] = {
  each.name: each
  for each in (
    Architecture(
      "llama",
      _fields("llama", "LlamaForCausalLM", **_SILU),
      _modules(_LLAMA),
      _NUMBERS,
      families=("mistral",),
      interleaved=True,
      rope_tensors=("rope_freqs.weight",),
      biases={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"},
    ),
    Architecture(
      "qwen2",
      _fields("qwen2", "Qwen2ForCausalLM", **_SILU),
      _modules(_LLAMA),
      _NUMBERS,
    ),
    Architecture(
      "qwen3",
      _fields("qwen3", "Qwen3ForCausalLM", **_SILU, attention_bias=False),
      _modules(_LLAMA | _HEAD_NORMS),
      _NUMBERS,
    ),
    Architecture(
      "gemma",
      _fields("gemma", "GemmaForCausalLM", **_GEMMA),
      _without_head(_modules(_LLAMA)),
      _NUMBERS,
      norm_offset=1.0,
    ),
    Architecture(
      "gemma2",
      _fields("gemma2", "Gemma2ForCausalLM", **_GEMMA),
      _without_head(_modules(_OUTER_NORMS)),
      {**_WINDOWED, **_FINAL_CAP, **_ATTENTION_CAP},
      norm_offset=1.0,
      full_every=2,
      width_scaled=46,
    ),
    Architecture(
      "gemma3",
      _fields("gemma3_text", "Gemma3ForCausalLM", **_GEMMA),
      _modules(_OUTER_NORMS | _HEAD_NORMS),
      {**_WINDOWED, **_FINAL_CAP, "rope.freq_base_swa": "rope_local_base_freq"},
      optional={
        **_OPTIONAL,
        "rope.freq_base_swa": 10000.0,
        "final_logit_softcapping": None,
      },
      norm_offset=1.0,
      full_every=6,
      width_scaled=62,
    ),
    Architecture(
      "phi3",
      _fields("phi3", "Phi3ForCausalLM", **_SILU),
      _modules(_FUSED),
      {
        **_WINDOWED,
        "rope.scaling.original_context_length": "original_max_position_embeddings",
      },
      optional={**_OPTIONAL, "rope.scaling.original_context_length": None},
      full_every=0,
      rope_tensors=("rope_factors_short.weight", "rope_factors_long.weight"),
      partial_rope=True,
    ),
    Architecture(
      "gpt2",
      _fields(
        "gpt2",
        "GPT2LMHeadModel",
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
      ),
      _GPT2,
      {
        "block_count": "n_layer",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "context_length": "n_positions",
      },
      transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
  )
}


def of_model(model_type: str) -> Architecture:
  """The architecture that a family is written as. None there: LoraxError."""
  names = {name: each for each in ARCHITECTURES.values() for name in each.model_types}
  if model_type not in names:
    raise LoraxError("GGUF: " + unknown("model family", model_type, names))
  return names[model_type]
