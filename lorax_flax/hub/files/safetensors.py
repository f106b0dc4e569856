"""Weights of a Hugging Face folder, read a part of a tensor at a time.

Bytes are read into the destination array and not memory-mapped: a file that changes
under a mapping ends the process, and every page that was touched would count as the
process's memory beside the array that it was copied to.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.errors import LoraxError, check_known, listing, prefixed, unknown
from lorax_flax.files import strict_json
from lorax_flax.hub.files import safetensors_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bytes; what is transposed on the way stays in the processor's cache.
_CHUNK = 256 << 10
_HUGE_PAGE = 2 << 20
_PAGES = 128 << 10  # bytes of the least array that has pages of its own
_ALIGNED = 64  # bytes; XLA uses an array with this alignment without a copy

Index = tuple[slice, ...]


@dataclass(frozen=True)
class File:
  """One file of tensors. It is opened for each read, and must not change meanwhile.

  Attributes:
    path: the file.
    tensors: by key, each with its `shape`, and the `array_dtype` of its arrays.
    status: of the file when its header was read.
    fill: (descriptor, tensor, index, out): `read` of the open file, by its format.
    fill_rows: (descriptor, tensor) -> the bytes of a tensor that is stored in blocks,
      (rows, bytes) uint8; of a format that has such.
  """

  path: Path
  tensors: Mapping[str, Any]
  status: os.stat_result
  fill: Callable[[int, Any, Index, np.ndarray], None]
  fill_rows: Callable[[int, Any], np.ndarray] | None = None

  def read(self, key: str, index: Index, out: np.ndarray) -> None:
    """Fills `out`, of any strides and dtype, with a part of a tensor."""
    with self._opened(key) as descriptor:
      self.fill(descriptor, self.tensors[key], index, out)

  def rows(self, key: str) -> np.ndarray:
    """The bytes of a tensor in blocks."""
    assert self.fill_rows is not None  # Otherwise there are no blocks.
    with self._opened(key) as descriptor:
      return self.fill_rows(descriptor, self.tensors[key])

  @contextlib.contextmanager
  def _opened(self, key: str) -> Iterator[int]:
    with prefixed(f"cannot read {key!r} of {self.path}", OSError):
      descriptor = os.open(self.path, os.O_RDONLY)
      try:
        now = os.fstat(descriptor)
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (
          self.status.st_ino,
          self.status.st_size,
          self.status.st_mtime_ns,
        ):
          raise LoraxError("it was written to since it was opened")
        yield descriptor
      finally:
        os.close(descriptor)


class Reader(Mapping[str, np.ndarray]):
  """The tensors of a checkpoint by stored key, each read on access."""

  def __init__(self, files: Mapping[str, File]):
    self._files = dict(files)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)

  def shape(self, key: str) -> tuple[int, ...]:
    """The stored shape, from the header alone."""
    return self._stored(key).shape

  def dtype(self, key: str) -> np.dtype:
    """The stored dtype, from the header alone. Unsupported: LoraxError."""
    stored = self._stored(key)
    with prefixed(f"cannot read {key!r} of {self._files[key].path}"):
      return stored.array_dtype

  def __getitem__(self, key: str) -> np.ndarray:
    return self.part(key, (slice(None),) * len(self.shape(key)))

  def part(self, key: str, index: Index) -> np.ndarray:
    """A part of a tensor; nothing else is kept in memory."""
    shape = [len(range(n)[cut]) for cut, n in zip(index, self.shape(key), strict=True)]
    out = empty(shape, self.dtype(key))
    self.read(key, index, out)
    return out

  def read(self, key: str, index: Index, out: np.ndarray) -> None:
    """Fills `out`, which may be a view of a larger array, with a part of a tensor.

    Args:
      index: of the stored tensor, steps of 1.
      out: of the part's shape; the numbers are cast to its dtype.
    """
    self._stored(key)
    self._files[key].read(key, index, out)

  def blocks(self, key: str) -> str | None:
    """The name of the blocks in which a tensor is stored; None: it is numbers."""
    stored = self._stored(key)
    return stored.blocks if self._files[key].fill_rows is not None else None

  def rows(self, key: str) -> np.ndarray:
    """The bytes of a tensor that is stored in blocks, (rows, bytes) uint8."""
    return self._files[key].rows(key)

  def same(self, key: str, other: str) -> bool:
    """True where two tensors are equal in shape and in every number."""
    shape = self.shape(key)
    if shape != self.shape(other):
      return False
    if not shape:
      return bool(self[key] == self[other])
    rows = _rows_at_once(shape[1:], self.dtype(key).itemsize)
    rest = (slice(None),) * (len(shape) - 1)
    cuts = [(slice(i, i + rows), *rest) for i in range(0, shape[0], rows)]
    return all(
      np.array_equal(self.part(key, cut), self.part(other, cut)) for cut in cuts
    )

  def _stored(self, key: str) -> Any:
    check_known("checkpoint key", key, self._files)
    return self._files[key].tensors[key]


def open_folder(folder: Path) -> Reader:
  """Opens the weights of a folder: model.safetensors, or the shards of an index.

  A shard is a file of the folder, or a link in it: the hub's own cache is made of links
  to files elsewhere.

  Raises:
    LoraxError: no weights, a damaged file, an index that names a missing file.
  """
  if (folder / SINGLE).is_file():
    return open_file(folder / SINGLE)
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


def open_file(path: Path) -> Reader:
  """Opens the tensors of one file. Damaged or missing: LoraxError."""
  return of_file(_opened(path))


def _opened(path: Path) -> File:
  def fill(descriptor: int, stored: Any, index: Index, out: np.ndarray) -> None:
    cuts = [cut.indices(n)[:2] for cut, n in zip(index, stored.shape, strict=True)]
    _fill(descriptor, stored.start, stored.shape, cuts, stored.array_dtype, out)

  return File(path, *safetensors_header.read(path), fill)


def of_file(file: File) -> Reader:
  """The tensors of a file that is open already."""
  return Reader(dict.fromkeys(file.tensors, file))


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array, aligned so that `jax.device_put` to a CPU is no copy."""
  size = math.prod(shape) * dtype.itemsize
  # Aligned to a huge page, a large array takes one page fault for each of these.
  start = _HUGE_PAGE if size >= 2 * _HUGE_PAGE else _ALIGNED
  raw = _pages(size + start) if size >= _PAGES else np.empty(size + start, np.uint8)
  offset = -raw.ctypes.data % start
  return raw[offset : offset + size].view(dtype).reshape(shape)


def _pages(size: int) -> np.ndarray:
  """Bytes in pages of their own; among malloc's, they would part those it frees."""
  flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
  return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)


def _indexed(folder: Path) -> dict[str, File]:
  index = folder / INDEX
  where = strict_json.read_object(index).get("weight_map")
  if not isinstance(where, dict) or not all(
    isinstance(name, str) for name in where.values()
  ):
    raise LoraxError(f"{index} is no index of shards: its weight_map is {where!r:.80}")
  files: dict[str, File] = {}
  for name in sorted(set(where.values())):
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
      raise LoraxError(f"{index} names {name!r}, which is not a file of its folder")
    if not _is_file(folder / name):
      here = [p.name for p in folder.glob("*.safetensors")]
      raise LoraxError(unknown(f"shard in {index}", name, here))
    files[name] = _opened(folder / name)
  for key, name in where.items():
    check_known(f"weight of {folder / name}", key, files[name].tensors)
  return {key: files[name] for key, name in where.items()}


def _is_file(path: Path) -> bool:
  try:
    return path.is_file()
  except (OSError, ValueError):  # too long a name, or one with a zero in it
    return False


def _rows_at_once(row: Sequence[int], itemsize: int) -> int:
  return max(1, _CHUNK // max(1, itemsize * math.prod(row)))


def _fill(
  descriptor: int,
  start: int,
  shape: Sequence[int],
  cuts: Sequence[tuple[int, int]],
  dtype: np.dtype,
  out: np.ndarray,
) -> None:
  """Fills `out` with the part `cuts` of the array that begins at byte `start`."""
  if not out.size:
    return
  if not shape:
    shape, cuts, out = (1,), [(0, 1)], out[None]
  row = math.prod(shape[1:]) * dtype.itemsize
  first, last = cuts[0]
  full_rows = all(cut == (0, n) for cut, n in zip(cuts[1:], shape[1:], strict=True))
  if full_rows and out.dtype == dtype and out.flags.c_contiguous:
    read_bytes(descriptor, start + first * row, out)
    return
  # Parts of short rows: reading the gaps too costs less than many reads.
  if full_rows or row <= _CHUNK:
    inner = tuple(slice(*cut) for cut in cuts[1:])
    rows = max(1, _CHUNK // row)
    scratch = np.empty((min(rows, last - first), *shape[1:]), dtype)
    for i in range(first, last, rows):
      part = scratch[: min(rows, last - i)]
      read_bytes(descriptor, start + i * row, part)
      np.copyto(
        out[i - first : i - first + len(part)], part[:, *inner], casting="unsafe"
      )
    return
  for i in range(first, last):
    _fill(descriptor, start + i * row, shape[1:], cuts[1:], dtype, out[i - first])


def read_bytes(descriptor: int, start: int, out: np.ndarray) -> None:
  """Fills a contiguous array with the bytes from offset `start`."""
  view = out.reshape(-1).view(np.uint8).data
  while view:
    count = os.preadv(descriptor, [view], start)
    if not count:
      raise LoraxError("it is cut off")
    start, view = start + count, view[count:]
