"""LoRA adapters as GGUF files, which llama.cpp applies to a model (--lora).

A file holds the factors of each module under the names of the base's GGUF file:
NAME.lora_a is (r, in) and NAME.lora_b (out, r), whose rows are permuted where the
base's are; of the token embeddings, lora_a is (tokens, r). The scale is alpha / r, with
one alpha for all and each module's own r. So it is a state dict of loralib's under
other names. Source: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lorax_flax.errors import LoraxError, check_known, listing
from lorax_flax.hub.adapters.plain import Base, Plain
from lorax_flax.hub.files import (
  gguf_architectures,
  gguf_blocks,
  gguf_config,
  gguf_header,
  gguf_writer,
)
from lorax_flax.hub.files.gguf_blocks import Kind
from lorax_flax.hub.files.gguf_header import Header
from lorax_flax.hub.files.gguf_writer import Output

TOOL = "llama.cpp"
HAS_ALPHA = True
FILE = "adapter.gguf"
_TYPE, _ADAPTER = gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER
_KIND, _ALPHA = gguf.Keys.Adapter.TYPE, gguf.Keys.Adapter.LORA_ALPHA
_ENDS = {".lora_a": ".lora_A", ".lora_b": ".lora_B"}
_EMBEDDING = "token_embd"


def file_of(source: Path) -> Path:
  """The file itself, or the one in a folder that was written here."""
  return source / FILE if source.is_dir() else source


def is_adapter(source: Path) -> bool:
  """Checks whether a file, or a folder's, is a GGUF file of an adapter."""
  file = file_of(source)
  if file.suffix != gguf_header.SUFFIX or not file.is_file():
    return False
  return gguf_header.read(file).metadata.get(_TYPE) == _ADAPTER


def read(source: Path, base: Base) -> tuple[Mapping[str, np.ndarray], float]:
  """Reads a file, or the one in a folder.

  Raises:
    LoraxError: a damaged file, or one of another architecture or with other tensors
      than LoRA's.
  """
  header = gguf_header.read(file_of(source))
  gguf_blocks.check_readable(header)
  architecture = gguf_config.architecture_of(header)
  check_known("base", base.keymap.family, architecture.model_types)
  kind, alpha = header.metadata.get(_KIND), header.metadata.get(_ALPHA)
  if kind != "lora" or not isinstance(alpha, float) or not alpha > 0:
    raise LoraxError(
      f"{_KIND} is {kind!r} and {_ALPHA} {alpha!r}: a LoRA has 'lora' and a number"
      " above 0"
    )
  named = (_renamed(header, n, architecture, base.heads) for n in header.tensors)
  return dict(named), alpha


def _renamed(
  header: Header,
  name: str,
  architecture: gguf_architectures.Architecture,
  config: Mapping[str, Any],
) -> tuple[str, np.ndarray]:
  """A tensor under loralib's name, and in its form."""
  end = next((end for end in _ENDS if name.endswith(end)), None)
  if end is None:
    raise LoraxError(
      f"{name!r} is no factor of a LoRA: only tensors that end in"
      f" {listing(map(repr, _ENDS))} are read"
    )
  module, key = architecture.hf_name(name.removesuffix(end))
  value = gguf_blocks.tensor(header, name)
  if end == ".lora_b":
    form = architecture.form(module, config, 1)
    value = value[np.argsort(form.row_order(len(value)))]
  elif module == _EMBEDDING:
    value = value.T
  return key.removesuffix(".weight") + _ENDS[end], value


def _check_module(
  architecture: gguf_architectures.Architecture, key: str, tied: bool
) -> None:
  """Refuses tables that llama.cpp looks up, or multiplies with, without their LoRA."""
  module, _ = architecture.file_name(key.rpartition(".")[0] + ".weight")
  if module == "position_embd" or (tied and module in (_EMBEDDING, "output")):
    raise LoraxError(
      f"llama.cpp applies no LoRA to {key.rpartition('.')[0]}: it takes one on linear"
      " layers, and on token embeddings that are not the head too"
    )


def write(folder: Path, plain: Plain, base: Base) -> None:
  """Writes a new folder's adapter.gguf, float32.

  Raises:
    LoraxError: a module that llama.cpp has no form for, by name.
  """
  architecture = gguf_architectures.of_model(base.keymap.family)
  for key in plain.tensors:
    _check_module(architecture, key, base.tied)
  outputs = {}
  for key, value in plain.tensors.items():
    stem, _, factor = key.rpartition(".")
    module, name = architecture.file_name(f"{stem}.weight")
    end = f".{factor.lower()}"
    if end == ".lora_b":
      form = architecture.form(module, base.heads, 1)
      value = value[form.row_order(len(value))]
    elif module == _EMBEDDING:
      value = value.T
    outputs[name + end] = Output(value, Kind.F32)
  metadata = {_TYPE: _ADAPTER, _KIND: "lora", _ALPHA: plain.alpha}
  metadata |= gguf_writer.about(outputs.values())
  gguf_writer.write(folder / FILE, architecture.name, metadata, outputs)
