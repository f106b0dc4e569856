"""Weights of a Hugging Face folder, read one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lorax_flax.errors import LoraxError, listing, unknown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Reader(Mapping[str, np.ndarray]):
  """The tensors of a checkpoint by stored key; each is read when it is asked for."""

  def __init__(self, files: Mapping[str, Path]):
    self._files = dict(files)
    self._open: dict[Path, Any] = {}

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)

  def shape(self, key: str) -> tuple[int, ...]:
    """The stored shape, from the header alone."""
    return tuple(self._handle(key).get_slice(key).get_shape())

  def __getitem__(self, key: str) -> np.ndarray:
    try:
      return self._handle(key).get_tensor(key)
    # AttributeError: of a dtype that numpy has no name for (eight-bit floats).
    except (safetensors.SafetensorError, AttributeError) as error:
      raise LoraxError(f"cannot read {key!r} of {self._files[key]}: {error}") from error

  def part(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor; no more of it is read."""
    if all(
      cut.indices(n) == (0, n, 1) for cut, n in zip(index, self.shape(key), strict=True)
    ):
      return self[key]
    try:
      return self._handle(key).get_slice(key)[index]
    except (safetensors.SafetensorError, AttributeError) as error:
      raise LoraxError(f"cannot read {key!r} of {self._files[key]}: {error}") from error

  def _handle(self, key: str) -> Any:
    if key not in self._files:
      raise LoraxError(unknown("checkpoint key", key, self._files))
    path = self._files[key]
    if path not in self._open:
      self._open[path] = _open(path)
    return self._open[path]


def open_folder(folder: Path) -> Reader:
  """The weights of a folder: model.safetensors, or shards named by an index.

  Raises:
    LoraxError: no weights, a damaged file, an index that names what is not there.
  """
  if (folder / SINGLE).is_file():
    return Reader(dict.fromkeys(_keys(folder / SINGLE), folder / SINGLE))
  if (folder / INDEX).is_file():
    return Reader(_indexed(folder))
  inside = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  torch_files = [n for n in inside if n.endswith((".bin", ".pt", ".pth"))]
  if torch_files:
    raise LoraxError(
      f"{folder} holds {listing(torch_files)}, pickled weights, which are not opened"
      " since that runs code; save them from transformers with"
      " safe_serialization=True"
    )
  raise LoraxError(
    f"{folder} has no {SINGLE} and no {INDEX}. There are: {listing(inside) or 'none'}"
  )


def _open(path: Path) -> Any:
  try:
    return safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise LoraxError(f"cannot read {path}: {error}") from error


def _keys(path: Path) -> list[str]:
  return list(_open(path).keys())


def _indexed(folder: Path) -> dict[str, Path]:
  index = folder / INDEX
  try:
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    pairs = [(str(key), str(name)) for key, name in where.items()]
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise LoraxError(f"{index} is no index of shards: {error!r}") from error
  held: dict[str, set[str]] = {}
  for name in sorted({name for _, name in pairs}):
    if Path(name).name != name or name in ("", ".", ".."):
      raise LoraxError(f"{index} names {name!r}, which is not a file of its folder")
    if not (folder / name).is_file():
      here = [p.name for p in folder.glob("*.safetensors")]
      raise LoraxError(unknown(f"shard in {index}", name, here))
    held[name] = set(_keys(folder / name))
  for key, name in pairs:
    if key not in held[name]:
      raise LoraxError(unknown(f"weight of {folder / name}", key, held[name]))
  return {key: folder / name for key, name in pairs}
