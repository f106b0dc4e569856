"""A model written as a Hugging Face checkpoint that transformers loads."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic
from lorax_flax.hub.checkpoints.keymap import KeyMap, file_key
from lorax_flax.hub.files import gguf_header, gguf_tokenizer

WEIGHTS_FILE = "model.safetensors"

# The base's tokenizer, preprocessor and generation settings, copied as they are.
_BESIDE = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.txt",
  "vocab.json",
  "merges.txt",
  "spiece.model",
  "tokenizer.model",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",
  "preprocessor_config.json",
)


def write_checkpoint(
  folder: str | Path,
  params: Any,
  keymap: KeyMap,
  hf_config: Mapping[str, Any],
  *,
  architecture: str,
  labels: Sequence[str] | None,
  tokenizer_from: Path,
  overwrite: bool,
) -> None:
  """Writes config.json, model.safetensors and the tokenizer; all of it or nothing.

  Args:
    folder: the destination.
    params: the model's tree; each leaf is stored in its own dtype.
    keymap: of the model.
    hf_config: of the base; its fields of the head are replaced.
    architecture: transformers' class of the model.
    labels: names of the head's outputs; None where they are not classes.
    tokenizer_from: a folder whose tokenizer files are copied; a GGUF file's are
      converted.
    overwrite: whether to replace a folder that was written here.

  Raises:
    LoraxError: the destination is taken, or can't be written.
  """
  with atomic.new_folder(Path(folder), overwrite=overwrite) as scratch:
    config = to_hf_config(hf_config, architecture, labels)
    text = json.dumps(config, indent=2, sort_keys=True)
    (scratch / "config.json").write_text(f"{text}\n", encoding="utf-8")
    try:
      tensors = to_tensors(params, keymap)
      save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
      raise LoraxError(f"cannot write {folder}: {error}") from error
    for name in _BESIDE:
      if (tokenizer_from / name).is_file():
        shutil.copyfile(tokenizer_from / name, scratch / name)
    file = gguf_header.find(tokenizer_from)
    if file is not None and not (scratch / "tokenizer.json").is_file():
      gguf_tokenizer.write(file, scratch)


def to_hf_config(
  hf_config: Mapping[str, Any], architecture: str, labels: Sequence[str] | None
) -> dict[str, Any]:
  """The base's config.json with another architecture and other outputs."""
  config = dict(hf_config)
  # transformers would cast to the base's dtype; without it, it keeps the weights'.
  for name in ("_name_or_path", "dtype", "torch_dtype"):
    config.pop(name, None)
  config["architectures"] = [architecture]
  if labels is None:
    return config
  for name in ("num_labels", "problem_type", "_num_labels"):
    config.pop(name, None)
  config |= {
    "id2label": {str(i): name for i, name in enumerate(labels)},
    "label2id": {name: i for i, name in enumerate(labels)},
  }
  if len(labels) == 1:
    config["problem_type"] = "regression"
  return config


def to_tensors(params: Any, keymap: KeyMap) -> dict[str, np.ndarray]:
  """The tensors of a checkpoint, by key, of a params tree."""
  leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
  tensors = {}
  for bare, site in keymap.sites.items():
    leaf = leaves[site.path]
    value = site.entry.form.to_stored(leaf[site.place(leaf.shape)])
    tensors[file_key(keymap, bare)] = np.ascontiguousarray(value)
  return tensors
