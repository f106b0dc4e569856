"""A model written as a GGUF file, which llama.cpp loads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.files import atomic
from lorax_flax.files.workdir import write_json
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.checkpoints.keymap import KeyMap, file_key
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
  receipt: Mapping[str, Any] | None = None,
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
    receipt: the content of receipt.json.
    overwrite: whether to replace a folder that was written here.

  Raises:
    LoraxError: a weight that llama.cpp has no name for, or that `dtype` can't hold; a
      destination that is taken, or can't be written.
  """
  outputs = {name: Output(value, Kind.F32) for name, value in tensors.items()}
  for key, value in export.tensors(export.leaves(params, keymap), keymap):
    module, name = architecture.file_name(key)
    value = architecture.form(module, config, value.ndim).to_file(value)
    outputs[name] = Output(value, gguf_writer.kind_of(name, value, dtype))
  found = gguf_writer.about(outputs.values()) | dict(metadata)
  with atomic.new_folder(folder, overwrite=overwrite) as scratch:
    gguf_writer.write(scratch / FILE, architecture.name, found, outputs)
    (scratch / atomic.README).write_text(card, encoding="utf-8")
    if receipt is not None:
      write_json(scratch / export.RECEIPT, receipt)


def stored(
  keymap: KeyMap, architecture: Architecture, config: Mapping[str, Any], dtype: str
) -> Callable[[str, Any], np.ndarray]:
  """(path, a leaf) -> the leaf as the file of `write` has it, float32.

  Arguments as of `write`.
  """

  def read_again(path: str, leaf: Any) -> np.ndarray:
    leaf = np.array(leaf, np.float32)
    for bare in keymap.keys[path]:
      site = keymap.sites[bare]
      value = site.entry.form.to_stored(leaf[site.place(leaf.shape)])
      module, name = architecture.file_name(file_key(keymap, bare))
      # The order of rows, and what is added to norms, change nothing.
      turned = architecture.form(module, config, value.ndim).transposed
      value = value.T if turned else value
      kind = gguf_writer.kind_of(name, value, dtype)
      value[...] = gguf_writer.decoded(name, Output(value, kind))
    return leaf

  return read_again
