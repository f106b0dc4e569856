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

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError, check_known, listing, prefixed
from lorax_flax.files import atomic
from lorax_flax.hub.adapters import loralib
from lorax_flax.hub.checkpoints.keymap import KeyMap
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
from lorax_flax.methods import Adapter, LoRA

# The file of a folder that we write.
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


def read_adapter(
  source: str | Path, params: Any, keymap: KeyMap, config: Mapping[str, Any]
) -> tuple[Adapter, LoraConfig]:
  """Reads a file, or the one in a folder.

  Args:
    params: the base's tree.
    keymap: of the base.
    config: its config.json's fields with the numbers of heads.

  Returns:
    The adapter, float32, and a config that describes it.

  Raises:
    LoraxError: a damaged file, one of another architecture or with other tensors than
      LoRA's, or of another base.
  """
  header = gguf_header.read(file_of(Path(source).expanduser()))
  with prefixed(str(header.path)):
    gguf_blocks.check_readable(header)
    architecture = gguf_config.architecture_of(header)
    check_known("base", keymap.family, architecture.model_types)
    kind, alpha = header.metadata.get(_KIND), header.metadata.get(_ALPHA)
    if kind != "lora" or not isinstance(alpha, float) or not alpha > 0:
      raise LoraxError(
        f"{_KIND} is {kind!r} and {_ALPHA} {alpha!r}: a LoRA has 'lora' and a number"
        " above 0"
      )
    tensors = dict(
      _renamed(header, name, architecture, config) for name in header.tensors
    )
    return loralib.of_tensors(tensors, flatten(params), keymap, alpha)


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


def write_adapter(
  folder: str | Path,
  adapter: Adapter,
  keymap: KeyMap,
  config: Mapping[str, Any],
  *,
  tied: bool,
) -> None:
  """Writes a folder with adapter.gguf, float32, whole or not at all.

  Args:
    adapter: of LoRA alone.
    keymap: of the base.
    config: its config.json's fields with the numbers of heads.
    tied: in the base's own file one table is the token embeddings and the head.

  Raises:
    LoraxError: a delta or a module that llama.cpp has no form for, by name.
  """
  architecture = gguf_architectures.of_model(keymap.family)
  for path, delta in adapter.items():
    if type(delta) is not LoRA:
      raise LoraxError(
        f"llama.cpp applies the two factors of LoRA alone, and {path} has a"
        f" {type(delta).__name__} (no DoRA, biases, other methods, or weights trained"
        " in full). Merge the adapter instead (experiments.merge --format=gguf)"
      )
  tensors, alpha = loralib.to_state_dict(adapter, keymap)
  for key in tensors:
    _check_module(architecture, key, tied)
  outputs = {}
  for key, value in tensors.items():
    stem, _, factor = key.rpartition(".")
    module, name = architecture.file_name(f"{stem}.weight")
    end = f".{factor.lower()}"
    if end == ".lora_b":
      form = architecture.form(module, config, 1)
      value = value[form.row_order(len(value))]
    elif module == _EMBEDDING:
      value = value.T
    outputs[name + end] = Output(value, Kind.F32)
  metadata = {_TYPE: _ADAPTER, _KIND: "lora", _ALPHA: float(alpha)}
  metadata |= gguf_writer.about(outputs.values())
  with atomic.new_folder(Path(folder).expanduser(), overwrite=True) as scratch:
    gguf_writer.write(scratch / FILE, architecture.name, metadata, outputs)
