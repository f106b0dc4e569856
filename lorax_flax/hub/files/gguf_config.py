"""The config.json that corresponds to the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.hub.files import gguf_blocks
from lorax_flax.hub.files.gguf_architectures import ARCHITECTURES, Architecture
from lorax_flax.hub.files.gguf_header import Header

TOKEN_IDS = {
  "tokenizer.ggml.bos_token_id": "bos_token_id",
  "tokenizer.ggml.eos_token_id": "eos_token_id",
  "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# Metadata of which only the default value is supported.
_ONLY = {"expert_count": 0, "expert_used_count": 0}


def of_header(header: Header) -> dict[str, Any]:
  """The config.json of a model.

  Raises:
    LoraxError: an architecture that is not in `ARCHITECTURES`, or metadata of the
      model that is unknown or not supported.
  """
  metadata, tensors, path = header.metadata, header.tensors, header.path
  architecture = architecture_of(header)
  name = architecture.name
  if metadata.get("general.type", "model") != "model":
    raise LoraxError(
      f"{path} holds no model: its general.type is {metadata['general.type']!r}"
    )
  if metadata.get("split.count", 1) != 1:
    count = metadata["split.count"]
    raise LoraxError(f"{path} is one of {count} parts: merge them first")
  required = [key for key in architecture.metadata if key not in architecture.optional]
  if missing := [key for key in required if f"{name}.{key}" not in metadata]:
    keys = listing(f"{name}.{key}" for key in missing)
    raise LoraxError(f"{path} has no metadata {keys}")
  if "token_embd.weight" not in tensors:
    there = listing(tensors, most=8) or "none"
    raise LoraxError(f"{path} has no token_embd.weight. There are: {there}")
  config = {
    **architecture.fields,
    **{
      field: metadata.get(f"{name}.{key}", architecture.optional.get(key))
      for key, field in architecture.metadata.items()
    },
    "vocab_size": tensors["token_embd.weight"].shape[0],
    "tie_word_embeddings": "output.weight" not in tensors,
    **{field: tensor in tensors for field, tensor in architecture.biases.items()},
    **{field: metadata[key] for key, field in TOKEN_IDS.items() if key in metadata},
  }
  only = {**_ONLY, "vocab_size": config["vocab_size"]}
  if "num_attention_heads" in config:
    only |= _heads(header, architecture, config) | _rope(header, architecture, config)
  _check_rest(header, architecture, only)
  return config


def architecture_of(header: Header) -> Architecture:
  """The architecture of a file. None that is read: LoraxError."""
  name = str(header.metadata.get("general.architecture"))
  if name not in ARCHITECTURES:
    raise LoraxError(f"{header.path}: " + unknown("architecture", name, ARCHITECTURES))
  return ARCHITECTURES[name]


def _heads(
  header: Header, architecture: Architecture, config: dict[str, Any]
) -> dict[str, Any]:
  """Adds fields of attention; returns metadata with the one value that it may have."""
  heads, width = config["num_attention_heads"], config["hidden_size"]
  if config["num_key_value_heads"] is None:
    config["num_key_value_heads"] = heads
  # Heads that do not divide the width are refused by the model's own config.
  if type(width) is int and type(heads) is int and heads and width % heads == 0:
    if config["head_dim"] is None:
      config["head_dim"] = width // heads
    if architecture.width_scaled is not None:
      config["query_pre_attn_scalar"] = architecture.attention_scalar(
        config["num_hidden_layers"], heads, width, config["head_dim"]
      )
  # llama.cpp's mark of a model without a window.
  if config.get("sliding_window") == 0:
    config["sliding_window"] = None
  key = "attention.value_length"
  given = header.metadata.get(f"{architecture.name}.{key}")
  only = {key: given if config["head_dim"] is None else config["head_dim"]}
  if architecture.full_every:
    only["attention.sliding_window_pattern"] = architecture.full_every
  return only


def _rope(
  header: Header, architecture: Architecture, config: dict[str, Any]
) -> dict[str, Any]:
  """Adds rotary positions; returns metadata with the one value that it may have."""
  name = f"{architecture.name}.rope"
  size = config.get("head_dim")
  dimensions = header.metadata.get(f"{name}.dimension_count")
  if architecture.partial_rope and type(size) is type(dimensions) is int and size:
    config["partial_rotary_factor"] = dimensions / size
    size = dimensions
  only = {"rope.dimension_count": dimensions if size is None else size}
  kind, factor, spread = (
    header.metadata.get(f"{name}.scaling.{key}")
    for key in ("type", "factor", "attn_factor")
  )
  factors = [
    gguf_blocks.tensor(header, each).tolist()
    for each in architecture.rope_tensors
    if each in header.tensors
  ]
  if len(factors) == 1:
    config["rope_scaling"] = _long_rope(factors * 2, 1.0)
  elif factors:
    config["rope_scaling"] = _long_rope(factors, spread)
    only |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": spread}
  # A file with a factor and no type means this one.
  elif factor is not None and kind in (None, "linear"):
    config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    only |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
  return {"rope.scaling.type": "none", **only}


def _long_rope(factors: list[list[float]], spread: float | None) -> dict[str, Any]:
  """Rotary positions of a factor for each pair, for short texts and for long ones."""
  numbers = dict(zip(("short_factor", "long_factor"), factors, strict=True))
  scale = {} if spread is None else {"attention_factor": spread}
  return {"rope_type": "longrope", **numbers, **scale}


def _check_rest(
  header: Header, architecture: Architecture, only: Mapping[str, Any]
) -> None:
  """Refuses all other metadata of the model, since it might change the numbers."""
  path, name = header.path, architecture.name
  for key, value in header.metadata.items():
    bare = key.removeprefix(f"{name}.")
    if bare == key or bare in architecture.metadata:
      continue
    if bare not in only:
      known = [*architecture.metadata, *only]
      raise LoraxError(f"{path}: " + unknown("value", key, known))
    if value != only[bare]:
      raise LoraxError(
        f"{path}: {key}={value!r} is not supported, only {only[bare]!r} is; this model"
        " would not compute what the file was made for"
      )
