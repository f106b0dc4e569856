"""Llama and its variants: the definition of each, and the reading of its config.json.

A variant's defaults are transformers' for fields that config.json leaves out.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.models import hf_config as fields
from lorax_flax.models import soft
from lorax_flax.models.family import Family, text_inputs
from lorax_flax.models.llama import hf_layers, keys
from lorax_flax.models.llama import model as decoder
from lorax_flax.models.llama.config import DecoderConfig, NormKind
from lorax_flax.models.llama.hf_layers import HfConfig


@dataclasses.dataclass(frozen=True)
class Variant:
  """One variant.

  Attributes:
    architecture: transformers' class of the model.
    defaults: of the fields that its config.json sets; other fields are ignored.
    fixed: fields that do not depend on config.json.
    windows: (config.json, number of layers) -> each layer's window.
    theta: default base of the rotary positions.
    ropes: (config.json, config, theta) -> the kinds of rotary positions, and each
      layer's kind.
    partial: only a part of a head's features may be rotated.
    normalize: config.json -> the same with the usual names and values of fields.
  """

  architecture: str
  defaults: Mapping[str, Any]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  windows: Callable[[HfConfig, int], hf_layers.Windows] = lambda _, count: (
    (None,) * count
  )
  theta: float = 10000.0
  ropes: Callable[[HfConfig, DecoderConfig, float], hf_layers.Ropes] = (
    hf_layers.one_rope
  )
  partial: bool = False
  normalize: Callable[[HfConfig], HfConfig] = lambda hf_config: hf_config


# Fields that change the numbers, with the one value that is supported.
_ONLY = {
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
  "output_router_logits": False,
  "router_jitter_noise": 0.0,
  "use_bidirectional_attention": False,
}
_ALIASES = {"num_local_experts": "num_experts"}
# Fields in which null is a value of its own, and not the default.
_NULLABLE = (
  "num_key_value_heads",
  "attn_logit_softcapping",
  "final_logit_softcapping",
)
_FIELDS = {field.name for field in dataclasses.fields(DecoderConfig)}


def from_hf(variant: Variant, hf_config: HfConfig, **overrides: Any) -> DecoderConfig:
  """Reads a config.json that is already parsed; see `fields.read`."""
  hf_config = variant.normalize(hf_config)
  used = {"model_type", *variant.defaults}
  given = {k: v for k, v in hf_config.items() if k not in _FIELDS or k in used}
  nulls = {k: None for k in _NULLABLE if given.get(k, ...) is None}
  config = fields.read(
    DecoderConfig,
    given,
    defaults={**variant.defaults, **nulls},
    only=_ONLY,
    aliases={k: v for k, v in _ALIASES.items() if v in used},
    **variant.fixed,
    **overrides,
  )
  count = config.num_hidden_layers
  config = dataclasses.replace(config, windows=variant.windows(hf_config, count))
  ropes, rope_of = variant.ropes(hf_config, config, variant.theta)
  if not variant.partial and any(rope.partial_rotary_factor != 1 for rope in ropes):
    raise LoraxError(
      f"config: partial_rotary_factor is not supported for a {config.model_type}"
    )
  return dataclasses.replace(config, ropes=ropes, rope_of=rope_of)


def _gemma_gelu(hf_config: HfConfig) -> HfConfig:
  """Gemma's first releases have "gelu" for its approximation."""
  if hf_config.get("hidden_act") != "gelu":
    return hf_config
  return {**hf_config, "hidden_act": "gelu_pytorch_tanh"}


def _hidden_activation(hf_config: HfConfig) -> HfConfig:
  """The activation is under another name; the usual one is ignored."""
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
_GEMMA_FIXED = {"norm": NormKind(offset=1.0, late=True), "embed_scaled": True}
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

VARIANTS: dict[str, Variant] = {
  "llama": Variant(
    "LlamaForCausalLM", {**_LLAMA, "attention_bias": False, "mlp_bias": False}
  ),
  "mistral": Variant(
    "MistralForCausalLM", _MISTRAL, windows=hf_layers.window_everywhere(4096)
  ),
  "qwen2": Variant(
    "Qwen2ForCausalLM",
    _QWEN2,
    {"attention_bias": True, "output_bias": False},
    windows=_QWEN_WINDOWS,
  ),
  "qwen3": Variant(
    "Qwen3ForCausalLM",
    {**_QWEN2, "head_dim": 128, "attention_bias": False},
    {"qk_norm": True},
    windows=_QWEN_WINDOWS,
  ),
  "gemma": Variant("GemmaForCausalLM", _GEMMA, _GEMMA_FIXED, normalize=_gemma_gelu),
  "gemma2": Variant(
    "Gemma2ForCausalLM",
    {**_GEMMA2, "attn_logit_softcapping": 50.0},
    {**_GEMMA_FIXED, "outer_norms": True},
    windows=hf_layers.windows_by_types(4096, lambda _, layer: layer % 2 == 0),
    normalize=_hidden_activation,
  ),
  # Its attention has no soft-capping, whatever config.json has.
  "gemma3_text": Variant(
    "Gemma3ForCausalLM",
    {
      **_GEMMA2,
      "vocab_size": 262208,
      "max_position_embeddings": 131072,
      "final_logit_softcapping": None,
    },
    {**_GEMMA_FIXED, "outer_norms": True, "qk_norm": True},
    windows=hf_layers.windows_by_types(4096, hf_layers.all_but_each(6)),
    theta=1e6,
    ropes=hf_layers.gemma3_ropes,
    normalize=_hidden_activation,
  ),
  "phi3": Variant(
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
  "smollm3": Variant(
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
  "mixtral": Variant(
    "MixtralForCausalLM",
    {**_MISTRAL, "rms_norm_eps": 1e-5, "num_experts": 8, "num_experts_per_tok": 2},
    windows=hf_layers.window_everywhere(None),
    theta=1e6,
  ),
  "qwen3_moe": Variant(
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


def _family(variant: Variant) -> Family:
  return Family(
    task="causal-lm",
    architecture=variant.architecture,
    configure=functools.partial(from_hf, variant),
    build=decoder.CausalLM,
    keymap=keys.keymap,
    inputs=text_inputs,
    max_length=lambda config: config.max_position_embeddings,
    cache=lambda config: config.cache_layout,
    # Experts take tokens in one row.
    shards_tokens=lambda config: config.num_experts is None,
    soft=soft.PARTS,
  )


FAMILIES = {name: _family(variant) for name, variant in VARIANTS.items()}
