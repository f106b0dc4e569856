"""Llama and its relatives: what each of them is, and how its config.json is read.

A relative's defaults are what transformers takes where config.json is silent.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.models import decoder, fields, rope_fields
from lorax_flax.models.decoder_config import DecoderConfig
from lorax_flax.models.family import Family
from lorax_flax.models.ops import Rope

HfConfig = Mapping[str, Any]
Windows = tuple[int | None, ...]

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Relative:
  """One relative.

  Attributes:
    architecture: transformers' name of the model.
    defaults: of the fields that its config.json decides; it decides no others.
    is_: what it is whatever config.json says.
    windows: (config.json, number of layers) -> each layer's window.
    theta: the base of the rotary positions where config.json names none.
    ropes: (config.json, config) -> the kinds of rotary positions, each layer's kind.
    partial: a part of a head's features may turn.
    aliases: see `fields.read`; a field under its own name is then not looked at.
  """

  architecture: str
  defaults: Mapping[str, Any]
  is_: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  windows: Callable[[HfConfig, int], Windows] = lambda _, count: (None,) * count
  theta: float = 10000.0
  ropes: Callable[..., tuple[tuple[Rope, ...], tuple[int, ...]]] | None = None
  partial: bool = False
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


# What would change the numbers if it were set otherwise, and that we do not compute.
_ONLY = {"use_bidirectional_attention": False, "is_decoder": None}
# Where null is a value of its own, and not the default.
_NULLABLE = (
  "num_key_value_heads",
  "attn_logit_softcapping",
  "final_logit_softcapping",
)
_FIELDS = {field.name for field in dataclasses.fields(DecoderConfig)}


def from_hf(relative: Relative, hf_config: HfConfig, **asked: Any) -> DecoderConfig:
  """Reads a config.json that is already parsed; see `fields.read`."""
  decided = {"model_type", *relative.defaults} - set(relative.aliases.values())
  seen = {k: v for k, v in hf_config.items() if k not in _FIELDS or k in decided}
  nulls = {k: None for k in _NULLABLE if seen.get(k, ...) is None}
  config = fields.read(
    DecoderConfig,
    seen,
    defaults={**relative.defaults, **nulls},
    only=_ONLY,
    aliases=relative.aliases,
    **relative.is_,
    **asked,
  )
  count = config.num_hidden_layers
  config = dataclasses.replace(config, windows=relative.windows(hf_config, count))
  ropes, rope_of = (relative.ropes or _one_rope)(relative, hf_config, config)
  if not relative.partial and any(rope.partial_rotary_factor != 1 for rope in ropes):
    raise LoraxError(
      f"config: partial_rotary_factor is not supported for a {config.model_type}"
    )
  return dataclasses.replace(config, ropes=ropes, rope_of=rope_of)


def _window(hf_config: HfConfig, default: int | None) -> int | None:
  window = hf_config.get("sliding_window", default)
  if window is not None:
    says, good = "a positive integer or null", lambda x: x > 0
    fields.check("sliding_window", window, int, says, good)
  return window


def _flag(hf_config: HfConfig, name: str) -> bool:
  value = hf_config.get(name)
  fields.check(
    name, False if value is None else value, bool, "true or false", lambda x: True
  )
  return bool(value)


def _everywhere(default: int | None, *, switch: bool = False):
  """Every layer has the window, if config.json's switch says so where there is one."""

  def windows(hf_config: HfConfig, count: int) -> Windows:
    on = not switch or _flag(hf_config, "use_sliding_window")
    return (_window(hf_config, default) if on else None,) * count

  return windows


def _by_layer_types(
  default: int | None,
  slides: Callable[[HfConfig, int], bool],
  *,
  switch: bool = False,
):
  """The layers have it that `layer_types`, or by default `slides` of each, says.

  Args:
    switch: config.json may say that there is no window at all.
  """

  def windows(hf_config: HfConfig, count: int) -> Windows:
    on = not switch or _flag(hf_config, "use_sliding_window")
    window = _window(hf_config, default) if on else None
    types = hf_config.get("layer_types")
    if types is None:
      slide = [window is not None and slides(hf_config, i) for i in range(count)]
      return tuple(window if s else None for s in slide)
    return tuple(window if t == SLIDING else None for t in _types(types, count, window))

  return windows


def _types(types: Any, count: int, window: int | None) -> Sequence[str]:
  if not isinstance(types, list) or any(t not in (FULL, SLIDING) for t in types):
    raise LoraxError(
      f"config: layer_types must be a list of {FULL!r} and {SLIDING!r}, not {types!r}"
    )
  if len(types) != count:
    raise LoraxError(f"config: {len(types)} layer_types of {count} layers")
  if window is None and SLIDING in types:
    raise LoraxError(f"config: a layer of {SLIDING!r} without a sliding_window")
  return types


def _number(hf_config: HfConfig, name: str, default: int) -> int:
  value = hf_config.get(name)
  value = default if value is None else value
  fields.check(name, value, int, "an integer from 0 on", lambda x: x >= 0)
  return value


def _late_layers(hf_config: HfConfig, layer: int) -> bool:
  return layer >= _number(hf_config, "max_window_layers", 28)


def _one_rope(relative: Relative, hf_config: HfConfig, config: DecoderConfig):
  rope = rope_fields.read(
    rope_fields.given(hf_config),
    hf_config,
    max_position_embeddings=config.max_position_embeddings,
    theta=relative.theta,
  )
  return (rope,), (0,) * config.num_hidden_layers


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

RELATIVES: dict[str, Relative] = {
  "llama": Relative(
    "LlamaForCausalLM", {**_LLAMA, "attention_bias": False, "mlp_bias": False}
  ),
  "mistral": Relative("MistralForCausalLM", _MISTRAL, windows=_everywhere(4096)),
  "qwen2": Relative(
    "Qwen2ForCausalLM",
    _QWEN2,
    {"attention_bias": True, "output_bias": False},
    windows=_by_layer_types(4096, _late_layers, switch=True),
  ),
}


def _family(relative: Relative) -> Family:
  return Family(
    task="causal-lm",
    architecture=relative.architecture,
    configure=lambda hf_config, **asked: from_hf(relative, hf_config, **asked),
    build=decoder.CausalLM,
    keymap=decoder.keymap,
    inputs=decoder.inputs,
    max_length=lambda config: config.max_position_embeddings,
  )


FAMILIES = {name: _family(relative) for name, relative in RELATIVES.items()}
