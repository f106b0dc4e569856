"""Models in GGUF files: their config, as config.json would have it, and weights.

Quantised tensors are dequantised to float32 as they are read, some rows at a time.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.hub.files import gguf_header, safetensors
from lorax_flax.hub.files.gguf_header import Header, Tensor

_Kind = gguf.GGMLQuantizationType
_FLOATS: Mapping[_Kind, Any] = {
  _Kind.F16: np.float16,
  _Kind.BF16: ml_dtypes.bfloat16,
  _Kind.F32: np.float32,
  _Kind.F64: np.float64,
}
_CHUNK = 1 << 18  # numbers that are dequantised at once


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One of llama.cpp's architectures.

  Attributes:
    fields: of config.json, which the file does not have.
    interleaved: rotary positions pair neighbouring features in the file, and the two
      halves of a head in Hugging Face's order: rows of queries and keys are permuted.
    biases: flags of config.json for biases, and for each a tensor that exists then.
  """

  fields: Mapping[str, Any]
  interleaved: bool = False
  biases: Mapping[str, str] = dataclasses.field(default_factory=dict)


ARCHITECTURES: Mapping[str, Architecture] = {
  "llama": Architecture(
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    interleaved=True,
    biases={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"},
  ),
  "qwen2": Architecture(
    {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
  ),
}

# Hugging Face's names of modules, outside of layers and inside.
_MODULES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_LAYER_MODULES = {
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
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}

# Metadata of the model, to its field in config.json.
_FIELDS = {
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
_REQUIRED = tuple(_FIELDS)[:6]
# Metadata of which only the default value is supported.
_ONLY = {
  "rope.scaling.type": "none",
  "expert_count": 0,
  "expert_used_count": 0,
}
_HEAD_SIZES = ("attention.value_length", "rope.dimension_count")
_TOKEN_IDS = {
  "tokenizer.ggml.bos_token_id": "bos_token_id",
  "tokenizer.ggml.eos_token_id": "eos_token_id",
  "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def read_config(path: Path) -> dict[str, Any]:
  """The config.json that corresponds to a GGUF file.

  Raises:
    LoraxError: a damaged file, an architecture that is not in `ARCHITECTURES`, or
      metadata of the model that is unknown or not supported.
  """
  return config_of(gguf_header.read(path))


def config_of(header: Header) -> dict[str, Any]:
  """`read_config` of a header that is already read."""
  metadata, tensors, path = header.metadata, header.tensors, header.path
  name = metadata.get("general.architecture")
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise LoraxError(f"{path}: " + unknown("architecture", str(name), ARCHITECTURES))
  architecture = ARCHITECTURES[name]
  if metadata.get("split.count", 1) != 1:
    count = metadata["split.count"]
    raise LoraxError(f"{path} is one of {count} parts: merge them first")
  if missing := [key for key in _REQUIRED if f"{name}.{key}" not in metadata]:
    keys = listing(f"{name}.{key}" for key in missing)
    raise LoraxError(f"{path} has no metadata {keys}")
  if "token_embd.weight" not in tensors:
    there = listing(tensors, most=8) or "none"
    raise LoraxError(f"{path} has no token_embd.weight. There are: {there}")
  config = {"hidden_act": "silu", **architecture.fields}
  for key, field in _FIELDS.items():
    if f"{name}.{key}" in metadata:
      config[field] = metadata[f"{name}.{key}"]
  config["vocab_size"] = tensors["token_embd.weight"].shape[0]
  config["tie_word_embeddings"] = "output.weight" not in tensors
  for field, tensor in architecture.biases.items():
    config[field] = tensor in tensors
  for key, field in _TOKEN_IDS.items():
    if key in metadata:
      config[field] = metadata[key]
  heads, width = config["num_attention_heads"], config["hidden_size"]
  config.setdefault("num_key_value_heads", heads)
  if type(width) is int and type(heads) is int and heads and width % heads == 0:
    config.setdefault("head_dim", width // heads)
  # Heads that do not divide the width are refused by the model's own config.
  head = {
    key: config.get("head_dim", metadata.get(f"{name}.{key}")) for key in _HEAD_SIZES
  }
  only = {**_ONLY, **head, "vocab_size": config["vocab_size"]}
  _check_rest(path, name, metadata, only)
  return config


def _check_rest(
  path: Path, name: str, metadata: Mapping[str, Any], only: Mapping[str, Any]
) -> None:
  """Refuses all other metadata of the model, since it might change the numbers."""
  for key, value in metadata.items():
    bare = key.removeprefix(f"{name}.")
    if bare == key or bare in _FIELDS:
      continue
    if bare not in only:
      raise LoraxError(f"{path}: " + unknown("value", key, [*_FIELDS, *only]))
    if value != only[bare]:
      raise LoraxError(
        f"{path}: {key}={value!r} is not supported, only {only[bare]!r} is; this model"
        " would not compute what the file was made for"
      )


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor as it is read.

  Attributes:
    tensor: as the file has it.
    heads: number of heads whose rows are in llama.cpp's order; None: rows are in ours.
  """

  tensor: Tensor
  heads: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape

  @property
  def array_dtype(self) -> np.dtype:
    return np.dtype(_FLOATS.get(self.tensor.kind, np.float32))


def open_file(path: Path) -> safetensors.Reader:
  """Opens the weights of a file, by Hugging Face's keys; quantised ones are float32.

  Raises:
    LoraxError: an error of `read_config`, or a tensor of an unknown name.
  """
  header = gguf_header.read(path)
  file = safetensors.File(path, _named(header), header.status, _fill)
  return safetensors.of_file(file)


def _named(header: Header) -> dict[str, Stored]:
  """The tensors under Hugging Face's names."""
  config = config_of(header)
  name = header.metadata["general.architecture"]
  interleaved = ARCHITECTURES[name].interleaved
  found: dict[str, Stored] = {}
  for name, tensor in header.tensors.items():
    layer, module, part = _split(header.path, name)
    key = _MODULES[module] if layer is None else _LAYER_MODULES[module]
    full = f"{key}.{part}" if layer is None else f"model.layers.{layer}.{key}.{part}"
    heads = config[_HEADS[module]] if interleaved and module in _HEADS else None
    if heads is not None and not (
      type(heads) is int and heads > 0 and tensor.shape[0] % (2 * heads) == 0
    ):
      raise LoraxError(
        f"{header.path}: {name!r} has shape {tensor.shape}, which {heads!r} heads do"
        " not divide"
      )
    if len(tensor.shape) > 2:
      raise LoraxError(f"{header.path}: {name!r} has shape {tensor.shape}")
    found[full] = Stored(tensor, heads)
  return found


def _split(path: Path, name: str) -> tuple[str | None, str, str]:
  """A tensor's layer, module, and "weight" or "bias"."""
  match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,3})\.)?(\w+)\.(weight|bias)", name)
  if match is not None:
    layer, module, part = match.groups()
    if module in (_MODULES if layer is None else _LAYER_MODULES):
      return layer, module, part
  layers = [f"blk.N.{module}.weight" for module in _LAYER_MODULES]
  known = [*(f"{module}.weight" for module in _MODULES), *layers]
  raise LoraxError(f"{path}: " + unknown("tensor", name, known))


def _fill(
  descriptor: int, stored: Stored, index: safetensors.Index, out: np.ndarray
) -> None:
  """Fills `out` with a part of a tensor, some rows at a time."""
  tensor = stored.tensor
  order = np.arange(tensor.shape[0])
  if stored.heads is not None:
    # Our row (head, half, i) is the file's row (head, i, half).
    order = order.reshape(stored.heads, -1, 2).swapaxes(1, 2).reshape(-1)
  if len(tensor.shape) == 1:
    out[...] = _rows(descriptor, tensor, 0, 1)[0][order[index[0]]]
    return
  order = order[index[0]]
  step = max(1, _CHUNK // tensor.shape[1])
  for i in range(0, len(order), step):
    chunk = order[i : i + step]
    low, high = int(chunk.min()), int(chunk.max()) + 1
    rows = _rows(descriptor, tensor, low, high)
    out[i : i + step] = rows[chunk - low, index[1]]


def _rows(descriptor: int, tensor: Tensor, low: int, high: int) -> np.ndarray:
  """Rows as floats."""
  start = tensor.start + low * tensor.row_bytes
  data = np.empty((high - low, tensor.row_bytes), np.uint8)
  safetensors.read_bytes(descriptor, start, data)
  if tensor.kind in _FLOATS:
    return data.view(_FLOATS[tensor.kind])
  try:
    # A damaged block can hold infinities, and their products with zero.
    with np.errstate(all="ignore"):
      return gguf.quants.dequantize(data, tensor.kind)
  except NotImplementedError as error:
    raise LoraxError(
      f"its numbers are {tensor.kind.name}, which is not dequantised"
    ) from error
