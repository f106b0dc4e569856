"""The metadata of a model's GGUF file, by its config."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.hub.files.gguf_architectures import Architecture, of_model
from lorax_flax.models.gpt2 import GPT2Config
from lorax_flax.models.llama.config import DecoderConfig
from lorax_flax.models.ops import rope as ropes
from lorax_flax.models.registry import Outline


@dataclass(frozen=True)
class Description:
  """Metadata and tensors of a file beside a model's weights.

  Attributes:
    architecture: llama.cpp's.
    config: fields of config.json that the forms of tensors depend on.
    metadata: by the file's names, its tokenizer's aside.
    tensors: beside the weights, float32.
  """

  architecture: Architecture
  config: dict[str, Any]
  metadata: dict[str, Any]
  tensors: dict[str, np.ndarray]


def describe(model: Outline) -> Description:
  """The description of a model.

  Raises:
    LoraxError: a family that llama.cpp has no architecture for here, or a config whose
      model it would compute in another way; it names the field.
  """
  config = model.config
  architecture = of_model(model.hf_config["model_type"])
  for field, value in architecture.fields.items():
    found = getattr(config, field, value)
    if found != value and field != "model_type":
      raise _other(architecture, field, found, value)
  values, more, tensors = (
    _gpt2(config) if isinstance(config, GPT2Config) else _decoder(architecture, config)
  )
  for key, field in architecture.metadata.items():
    if values[field] is not None:
      more[key] = values[field]
    elif key not in architecture.optional:
      raise LoraxError(f"GGUF: a {architecture.name} needs {field}, which is null here")
  metadata = {f"{architecture.name}.{key}": value for key, value in more.items()}
  metadata[f"{architecture.name}.vocab_size"] = config.vocab_size
  return Description(architecture, values, metadata, tensors)


def heads(config: Any) -> dict[str, int]:
  """Fields of config.json that the order of a file's rows depends on."""
  if not isinstance(config, DecoderConfig):
    return {}
  return {
    "num_attention_heads": config.num_attention_heads,
    "num_key_value_heads": config.kv_heads,
  }


# Values of fields, further metadata, and tensors.
_Parts = tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]


def _gpt2(config: GPT2Config) -> _Parts:
  return {**vars(config), "n_inner": config.n_inner or 4 * config.n_embd}, {}, {}


def _decoder(architecture: Architecture, config: DecoderConfig) -> _Parts:
  head = config.head_size
  scalar = architecture.attention_scalar(
    config.num_hidden_layers, config.num_attention_heads, config.hidden_size, head
  )
  if (found := config.query_pre_attn_scalar or head) != scalar:
    raise _other(architecture, "query_pre_attn_scalar", found, scalar)
  rope = config.ropes[0]
  rotated = int(head * rope.partial_rotary_factor)
  values = {
    **vars(config),
    **heads(config),
    "head_dim": head,
    "rope_theta": rope.rope_theta,
    "original_max_position_embeddings": rope.original,
    "rope_local_base_freq": config.ropes[-1].rope_theta,
    **_window(architecture, config),
  }
  metadata = {"attention.value_length": head, "rope.dimension_count": rotated}
  scaling, tensors = _scaling(architecture, rope, head)
  if any(each.rope_type != "default" for each in config.ropes[1:]):
    kinds = [each.rope_type for each in config.ropes[1:]]
    raise _other(architecture, "rope_type of layers with a window", kinds, "default")
  return values, metadata | scaling, tensors


def _window(architecture: Architecture, config: DecoderConfig) -> dict[str, Any]:
  """Fields that depend on the layers' windows."""
  sizes = sorted({window for window in config.windows if window is not None})
  every = architecture.full_every
  if every is None:
    # llama.cpp has no window there: the two are equal up to the smallest.
    length = min([config.max_position_embeddings, *sizes])
    return {"max_position_embeddings": length}
  window = sizes[0] if sizes else None
  count = config.num_hidden_layers
  same = tuple(None if every and (i + 1) % every == 0 else window for i in range(count))
  if config.windows != same:
    raise _other(architecture, "windows of layers", config.windows, same)
  return {"sliding_window": window or (None if every else 0)}


def _scaling(
  architecture: Architecture, rope: ropes.Rope, head: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Metadata and tensors of the scaling of rotary positions."""
  if rope.rope_type == "default":
    return {}, {}
  if rope.rope_type == "linear":
    return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}, {}
  names = architecture.rope_tensors
  found: list[Any] = []
  scale = 1.0
  if rope.rope_type == "llama3":
    found = [ropes.wavelength_factors(rope, head)]
  elif rope.rope_type == "longrope":
    found = [rope.short_factor, rope.long_factor]
    # A model read from such a file has the same factors twice.
    found = found[:1] if len(names) == 1 and found[0] == found[1] else found
    scale = ropes.longrope_scale(rope)
  if not found or len(found) != len(names) or (len(names) == 1 and scale != 1):
    known = ["default", "linear", *_BY_TENSORS[len(names)]]
    raise _other(architecture, "rope_type", rope.rope_type, known)
  tensors = {n: np.asarray(x, np.float32) for n, x in zip(names, found, strict=True)}
  return {"rope.scaling.attn_factor": scale} if len(names) == 2 else {}, tensors


# The scalings that an architecture has, by its number of tensors of factors.
_BY_TENSORS = {0: (), 1: ("llama3",), 2: ("longrope",)}


def _other(architecture: Architecture, field: str, found: Any, only: Any) -> LoraxError:
  return LoraxError(
    f"GGUF: {field}={found!r} is not what llama.cpp computes for its"
    f" {architecture.name}, which has {only!r}: it would give other logits"
  )
