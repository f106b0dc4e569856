"""Fingerprints of what a run is made from, by which a resumed run knows it again."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.hub.checkpoints import beside
from lorax_flax.hub.files import gguf_header
from lorax_flax.models import registry
from lorax_flax.tasks.task import Splits

# A large file is known by blocks at equal distances: reading all of it would take as
# long as loading it once more. A smaller one is read from end to end.
_BLOCKS, _BLOCK_BYTES = 1024, 16 << 10


def of(
  model: registry.Loaded, splits: Splits, init_adapter: str | None
) -> dict[str, str]:
  """SHA-256 of base, tokenizer, rows of each split, and the adapter to start from.

  Returns:
    Digests by "base", "tokenizer", "data.train", "data.validation", ….
  """
  folder = model.folder
  single = gguf_header.find(folder)
  weights = folder.glob("*.safetensors") if single is None else [single]
  found = {
    "base": _of_files(
      weights, json.dumps(model.hf_config, sort_keys=True, default=str)
    ),
    "tokenizer": _of_files(beside.tokenizer_files(folder)),
    **{
      f"data.{name}": _of_rows(rows)
      for name, rows in {"train": splits.train, **splits.evaluation}.items()
    },
  }
  if init_adapter is not None:
    files = Path(init_adapter).expanduser().rglob("*")
    found["init_adapter"] = _of_files(files)
  return found


def _of_files(files: Iterable[Path], text: str = "") -> str:
  digest = hashlib.sha256(text.encode())
  for file in sorted({file for file in files if file.is_file()}):
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    # The distance is that of blocks side by side where they cover the file.
    step = max(_BLOCK_BYTES, -(-size // _BLOCKS))
    with file.open("rb") as stream:
      for start in range(0, size, step):
        stream.seek(start)
        digest.update(stream.read(_BLOCK_BYTES))
  return digest.hexdigest()


def _of_rows(rows: Any) -> str:
  digest = hashlib.sha256()
  for name, array in _arrays("", rows):
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()


def _arrays(name: str, value: Any) -> Iterable[tuple[str, np.ndarray]]:
  """The arrays of rows: dataclasses and lists of arrays, of numbers, of each other."""
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield from _arrays(f"{name}.{field.name}", getattr(value, field.name))
  elif isinstance(value, list):
    for number, each in enumerate(value):
      yield from _arrays(f"{name}[{number}]", each)
  elif value is not None:
    yield name, np.asarray(value)
