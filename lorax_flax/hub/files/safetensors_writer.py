"""Weights written as safetensors, a tensor at a time."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.files.workdir import write_json
from lorax_flax.hub.files import safetensors_header
from lorax_flax.hub.files.safetensors import INDEX, SINGLE

_METADATA = {"format": "pt"}  # transformers asks for it.
# Bytes of the tensors of a file, as huggingface_hub splits by default.
_SHARD = 5 * 10**9


def write(
  folder: Path, likes: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
  """Writes model.safetensors, or shards of it with their index where it is large.

  Args:
    likes: by key, the `shape` and `dtype` of each tensor, in the order of `tensors`.
    tensors: keys and values, of any strides. Each is written before the next is taken.
  """
  shards = _split(likes)
  names = [SINGLE]
  if len(shards) > 1:
    stem, _, end = SINGLE.rpartition(".")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.{end}" for i in range(len(shards))]
    total = sum(map(_size, likes.values()))
    where = {key: n for n, each in zip(names, shards, strict=True) for key in each}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / INDEX, index)
  places: dict[str, tuple[Path, int]] = {}
  for name, shard in zip(names, shards, strict=True):
    first, starts = safetensors_header.write(shard, _METADATA)
    (folder / name).write_bytes(first)
    places |= {key: (folder / name, start) for key, start in starts.items()}
  for key, value in tensors:
    file, start = places.pop(key)
    with file.open("r+b") as stream:
      stream.seek(start)
      stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
  assert not places, f"not given: {[*places]}"


def _split(likes: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The tensors of each file, in their order."""
  shards: list[dict[str, Any]] = [{}]
  room = _SHARD
  for key, like in likes.items():
    if shards[-1] and _size(like) > room:
      shards.append({})
      room = _SHARD
    shards[-1][key] = like
    room -= _size(like)
  return shards


def _size(like: Any) -> int:
  return math.prod(like.shape) * np.dtype(like.dtype).itemsize
