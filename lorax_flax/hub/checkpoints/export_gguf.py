"""A model written as a GGUF file, which llama.cpp loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.files import atomic
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.files import gguf_writer
from lorax_flax.hub.files.gguf_architectures import Architecture
from lorax_flax.hub.files.gguf_blocks import Kind
from lorax_flax.hub.files.gguf_writer import Output

FILE = "model.gguf"


def write(
  folder: Path,
  params: Any,
  keymap: KeyMap,
  architecture: Architecture,
  config: Mapping[str, Any],
  *,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  dtype: str | None,
  card: str,
  overwrite: bool,
) -> None:
  """Writes a folder with model.gguf and README.md, all or nothing.

  Args:
    params: the model's tree.
    keymap: of the model.
    config: fields of config.json that the forms of tensors depend on.
    metadata: of the file, its tokenizer's included.
    tensors: beside the weights, float32.
    dtype: of matrices: a name of `gguf_writer.KINDS`; None keeps each one's own.
    card: the text of README.md.
    overwrite: whether to replace a folder that was written here.

  Raises:
    LoraxError: a weight that llama.cpp has no name for, or that `dtype` can't hold; a
      destination that is taken, or can't be written.
  """
  outputs = {name: Output(value, Kind.F32) for name, value in tensors.items()}
  for key, value in export.views(params, keymap).items():
    export.check_finite(key, value)
    module, name = architecture.file_name(key)
    value = architecture.form(module, config, value.ndim).to_file(value)
    outputs[name] = Output(value, gguf_writer.kind_of(name, value, dtype))
  found = gguf_writer.about(outputs.values()) | dict(metadata)
  with atomic.new_folder(folder, overwrite=overwrite) as scratch:
    gguf_writer.write(scratch / FILE, architecture.name, found, outputs)
    (scratch / atomic.README).write_text(card, encoding="utf-8")
