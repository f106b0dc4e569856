"""Llama and its relatives: what each of them is, and how its config.json is read.

A relative's defaults are what transformers takes where config.json is silent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.models import hf_config as fields
from lorax_flax.models.family import Family, text_inputs
from lorax_flax.models.llama import hf_layers
from lorax_flax.models.llama import model as decoder
from lorax_flax.models.llama.config import DecoderConfig, NormKind
from lorax_flax.models.llama.hf_layers import HfConfig


@dataclasses.dataclass(frozen=True)
class Relative:
  """One relative.

  Attributes:
    architecture: transformers' name of the model.
    defaults: of the fields that its config.json decides; it decides no others.
    is_: what it is whatever config.json says.
    windows: (config.json, number of layers) -> each layer's window.
    theta: the base of the rotary positions where config.json names none.
    ropes: (config.json, config, theta) -> the kinds of rotary positions, and each
      layer's kind.
    partial: a part of a head's features may turn.
    renew: config.json, with fields that it has under other names or in other words.
  """

  architecture: str
  defaults: Mapping[str, Any]
  is_: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  windows: Callable[[HfConfig, int], hf_layers.Windows] = lambda _, count: (
    (None,) * count
  )
  theta: float = 10000.0
  ropes: Callable[[HfConfig, DecoderConfig, float], hf_layers.Ropes] = (
    hf_layers.one_rope
  )
  partial: bool = False
  renew: Callable[[HfConfig], HfConfig] = lambda hf_config: hf_config


# What would change the numbers if it were set otherwise, and that we do not compute.
_ONLY = {
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
  "output_router_logits": False,
  "router_jitter_noise": 0.0,
  "use_bidirectional_attention": False,
}
_ALIASES = {"num_local_experts": "num_experts"}
# Where null is a value of its own, and not the default.
_NULLABLE = (
  "num_key_value_heads",
  "attn_logit_softcapping",
  "final_logit_softcapping",
)
_FIELDS = {field.name for field in dataclasses.fields(DecoderConfig)}


def from_hf(relative: Relative, hf_config: HfConfig, **asked: Any) -> DecoderConfig:
  """Reads a config.json that is already parsed; see `fields.read`."""
  hf_config = relative.renew(hf_config)
  decided = {"model_type", *relative.defaults}
  seen = {k: v for k, v in hf_config.items() if k not in _FIELDS or k in decided}
  nulls = {k: None for k in _NULLABLE if seen.get(k, ...) is None}
  config = fields.read(
    DecoderConfig,
    seen,
    defaults={**relative.defaults, **nulls},
    only=_ONLY,
    aliases={k: v for k, v in _ALIASES.items() if v in decided},
    **relative.is_,
    **asked,
  )
  count = config.num_hidden_layers
  config = dataclasses.replace(config, windows=relative.windows(hf_config, count))
  ropes, rope_of = relative.ropes(hf_config, config, relative.theta)
  if not relative.partial and any(rope.partial_rotary_factor != 1 for rope in ropes):
    raise LoraxError(
      f"config: partial_rotary_factor is not supported for a {config.model_type}"
    )
  return dataclasses.replace(config, ropes=ropes, rope_of=rope_of)


def _gemma_gelu(hf_config: HfConfig) -> HfConfig:
  """Gemma's first releases say "gelu" and mean its approximation."""
  if hf_config.get("hidden_act") != "gelu":
    return hf_config
  return {**hf_config, "hidden_act": "gelu_pytorch_tanh"}


def _hidden_activation(hf_config: HfConfig) -> HfConfig:
  """The activation is under another name; the usual one is not looked at."""
  return {**hf_config, "hidden_act": hf_config.get("hidden_activation")}


_LLAMA = {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": None,
  "head_dim": None,
  "hidden_act": "silu",
  "max_position_embeddings": 2048,
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_dropout": 0.0,
}
_MISTRAL = {
  **_LLAMA,
  "intermediate_size": 14336,
  "num_key_value_heads": 8,
  "max_position_embeddings": 4096 * 32,
}
_QWEN2 = {
  **_LLAMA,
  "vocab_size": 151936,
  "intermediate_size": 22016,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
}

_QWEN_WINDOWS = hf_layers.windows_by_types(4096, hf_layers.late_layers, switch=True)
_GEMMA = {
  **_LLAMA,
  "vocab_size": 256000,
  "hidden_size": 3072,
  "intermediate_size": 24576,
  "num_hidden_layers": 28,
  "num_attention_heads": 16,
  "num_key_value_heads": 16,
  "head_dim": 256,
  "hidden_act": "gelu_pytorch_tanh",
  "max_position_embeddings": 8192,
  "tie_word_embeddings": True,
  "attention_bias": False,
}
_IS_GEMMA = {"norm": NormKind(offset=1.0, late=True), "embed_scaled": True}
_GEMMA2 = {
  **_GEMMA,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "query_pre_attn_scalar": 256,
  "final_logit_softcapping": 30.0,
}

RELATIVES: dict[str, Relative] = {
  "llama": Relative(
    "LlamaForCausalLM", {**_LLAMA, "attention_bias": False, "mlp_bias": False}
  ),
  "mistral": Relative(
    "MistralForCausalLM", _MISTRAL, windows=hf_layers.window_everywhere(4096)
  ),
  "qwen2": Relative(
    "Qwen2ForCausalLM",
    _QWEN2,
    {"attention_bias": True, "output_bias": False},
    windows=_QWEN_WINDOWS,
  ),
  "qwen3": Relative(
    "Qwen3ForCausalLM",
    {**_QWEN2, "head_dim": 128, "attention_bias": False},
    {"qk_norm": True},
    windows=_QWEN_WINDOWS,
  ),
  "gemma": Relative("GemmaForCausalLM", _GEMMA, _IS_GEMMA, renew=_gemma_gelu),
  "gemma2": Relative(
    "Gemma2ForCausalLM",
    {**_GEMMA2, "attn_logit_softcapping": 50.0},
    {**_IS_GEMMA, "outer_norms": True},
    windows=hf_layers.windows_by_types(4096, lambda _, layer: layer % 2 == 0),
    renew=_hidden_activation,
  ),
  # Its attention has no soft-capping, whatever config.json says.
  "gemma3_text": Relative(
    "Gemma3ForCausalLM",
    {
      **_GEMMA2,
      "vocab_size": 262208,
      "max_position_embeddings": 131072,
      "final_logit_softcapping": None,
    },
    {**_IS_GEMMA, "outer_norms": True, "qk_norm": True},
    windows=hf_layers.windows_by_types(4096, hf_layers.all_but_each(6)),
    theta=1e6,
    ropes=hf_layers.gemma3_ropes,
    renew=_hidden_activation,
  ),
  "phi3": Relative(
    "Phi3ForCausalLM",
    {
      **_LLAMA,
      "vocab_size": 32064,
      "hidden_size": 3072,
      "intermediate_size": 8192,
      "max_position_embeddings": 4096,
      "rms_norm_eps": 1e-5,
      "resid_pdrop": 0.0,
    },
    {"fused": True},
    windows=hf_layers.window_everywhere(None),
    ropes=hf_layers.phi3_rope,
    partial=True,
  ),
  "smollm3": Relative(
    "SmolLM3ForCausalLM",
    {
      **_LLAMA,
      "vocab_size": 128256,
      "hidden_size": 2048,
      "num_hidden_layers": 36,
      "num_attention_heads": 16,
      "num_key_value_heads": 4,
      "max_position_embeddings": 32768,
      "tie_word_embeddings": True,
      "attention_bias": False,
      "mlp_bias": False,
    },
    windows=hf_layers.windows_by_types(None, hf_layers.smollm3_slides, switch=True),
    theta=2e6,
    ropes=hf_layers.smollm3_ropes,
  ),
  "mixtral": Relative(
    "MixtralForCausalLM",
    {**_MISTRAL, "rms_norm_eps": 1e-5, "num_experts": 8, "num_experts_per_tok": 2},
    windows=hf_layers.window_everywhere(None),
    theta=1e6,
  ),
  "qwen3_moe": Relative(
    "Qwen3MoeForCausalLM",
    {
      **_QWEN2,
      "hidden_size": 2048,
      "intermediate_size": 6144,
      "num_hidden_layers": 24,
      "num_key_value_heads": 4,
      "attention_bias": False,
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "moe_intermediate_size": 768,
      "norm_topk_prob": False,
    },
    {"qk_norm": True},
    windows=hf_layers.window_everywhere(4096, switch=True),
  ),
}


def _family(relative: Relative) -> Family:
  return Family(
    task="causal-lm",
    architecture=relative.architecture,
    configure=lambda hf_config, **asked: from_hf(relative, hf_config, **asked),
    build=decoder.CausalLM,
    keymap=decoder.keymap,
    inputs=text_inputs,
    max_length=lambda config: config.max_position_embeddings,
  )


FAMILIES = {name: _family(relative) for name, relative in RELATIVES.items()}
