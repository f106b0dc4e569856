"""Files that lie beside a checkpoint's weights: its tokenizer, templates, settings."""

import fnmatch
import os
import shutil
from pathlib import Path

from lorax_flax.hub.files import gguf_header

# Of other libraries' weights too, and of optimisers.
_WEIGHTS = (
  *(
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.ckpt.*",
    "*.gguf",
    "*.ggml",
  ),
  *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.ot"),
  *("*.npz", "*.npy", "*.pkl", "*.index.json"),
)
# Of an adapter, and of the writer of a folder, who writes its own.
_OWN = ("config.json", "adapter_config.json", "labels.json", ".*")
_VOCABULARY = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "tekken.json")
_TOKENIZER = (
  *_VOCABULARY,
  *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("merges.txt", "chat_template.*", "additional_chat_templates"),
)


def copy(folder: Path, target: Path, adapter: Path | None = None) -> None:
  """Copies what lies beside a checkpoint and is no weight.

  Folders are copied where they hold no weights.

  Args:
    folder: of the checkpoint.
    target: an existing folder.
    adapter: a folder whose tokenizer, if it has one, takes the place of `folder`'s.
  """
  own_tokenizer = adapter is not None and has_tokenizer(adapter)
  _copy(folder, target, leave_out=_TOKENIZER if own_tokenizer else ())
  if adapter is not None and own_tokenizer:
    _copy(adapter, target, only=_TOKENIZER)


def has_tokenizer(folder: Path) -> bool:
  """True where a folder holds a tokenizer's vocabulary."""
  stored = any(_matches(path, _VOCABULARY) for path in _entries(folder))
  return stored or gguf_header.find(folder) is not None


def tokenizer_folder(folder: Path, adapter: Path | None) -> Path:
  """An adapter's folder where it has a tokenizer of its own, else the checkpoint's."""
  return adapter if adapter is not None and has_tokenizer(adapter) else folder


def tokenizer_files(folder: Path) -> list[Path]:
  """The files that a tokenizer is read from."""
  return [path for path in _entries(folder) if _matches(path, _TOKENIZER)]


def _copy(
  folder: Path,
  target: Path,
  *,
  only: tuple[str, ...] = ("*",),
  leave_out: tuple[str, ...] = (),
) -> None:
  for path in _entries(folder):
    if not _matches(path, only) or _matches(path, (*_WEIGHTS, *_OWN, *leave_out)):
      continue
    if path.is_dir() and not path.is_symlink():
      files = [name for _, _, names in os.walk(path) for name in names]
      if not any(_matches(Path(name), _WEIGHTS) for name in files):
        shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(".*"))
    elif path.is_file():
      shutil.copyfile(path, target / path.name)


def _entries(folder: Path) -> list[Path]:
  return sorted(folder.iterdir()) if folder.is_dir() else []


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
  return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
