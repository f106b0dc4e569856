"""The header of a GGUF file: metadata of the model, and its tensors' offsets.

The format is a magic number, a version, two counts, the metadata as typed values, an
entry of each tensor, and the tensors' bytes. The `gguf` package names the types and
their sizes; its reader allocates whatever lengths a damaged file claims, so that the
header is parsed here, within bounds.
Source: the format's description, docs/gguf.md of github.com/ggml-org/ggml.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lorax_flax.errors import LoraxError, listing, prefixed

SUFFIX = ".gguf"
_MOST_HEADER = 32 << 20  # bytes; a vocabulary of 262,144 tokens takes about 12 MB
_MOST_ITEMS = 1 << 20  # of an array, and of anything else that is counted
_MOST_AXES = 4
_ALIGNMENT = "general.alignment"

_Type = gguf.GGUFValueType
_SCALARS: Mapping[_Type, str] = {
  _Type.UINT8: "u1",
  _Type.INT8: "i1",
  _Type.UINT16: "u2",
  _Type.INT16: "i2",
  _Type.UINT32: "u4",
  _Type.INT32: "i4",
  _Type.UINT64: "u8",
  _Type.INT64: "i8",
  _Type.FLOAT32: "f4",
  _Type.FLOAT64: "f8",
  _Type.BOOL: "?",
}


@dataclass(frozen=True)
class Tensor:
  """A tensor in a file.

  Attributes:
    kind: of its numbers: floats, or one of the quantised types.
    shape: in torch's order, which the file has reversed.
    start: offset of its first byte in the file.
  """

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  start: int

  @property
  def row_bytes(self) -> int:
    """Bytes of a row of the last axis, a multiple of a block's."""
    block, size = gguf.GGML_QUANT_SIZES[self.kind]
    return self.shape[-1] // block * size

  @property
  def stop(self) -> int:
    """The offset behind its last byte."""
    return self.start + math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
  """The part of a file before its tensors.

  Attributes:
    path: the file.
    metadata: values by name: numbers, strings, truth values and lists of one of these.
    tensors: by the names that they have in the file.
    status: of the file when it was read.
  """

  path: Path
  metadata: Mapping[str, Any]
  tensors: Mapping[str, Tensor]
  status: os.stat_result


def find(model: Path) -> Path | None:
  """The GGUF file that is this model: the path itself, or one in that folder.

  A folder with *.safetensors is a model in that format, whatever else it holds.

  Raises:
    LoraxError: more than one GGUF file.
  """
  if model.suffix == SUFFIX and model.is_file():
    return model
  names = sorted(p.name for p in model.iterdir()) if model.is_dir() else []
  found = [name for name in names if name.endswith(SUFFIX)]
  if not found or any(".safetensors" in name for name in names):
    return None
  if len(found) > 1:
    raise LoraxError(
      f"{model} holds {len(found)} GGUF files: name one of them,"
      f" {model}/FILE. There are: {listing(found)}"
    )
  return model / found[0]


def read(path: Path) -> Header:
  """Reads and checks a header, and that all tensors are within the file.

  Raises:
    LoraxError: a file that can't be read, that isn't GGUF version 2 or 3, or that is
      damaged in any way that its header or its length shows.
  """
  with prefixed(f"cannot read {path}", OSError, ValueError):
    with path.open("rb", buffering=0) as file:
      status = os.fstat(file.fileno())
      data = file.read(min(status.st_size, _MOST_HEADER))
    return _parse(path, _Cursor(data, len(data) < status.st_size), status)


class _Cursor:
  """A position in the header's bytes, which advances as they are read."""

  def __init__(self, data: bytes, is_prefix: bool):
    self._data = data
    self._is_prefix = is_prefix
    self.offset = 0

  def take(self, count: int) -> bytes:
    end = self.offset + count
    if end > len(self._data):
      raise LoraxError(
        f"its header claims more than {_MOST_HEADER:,} bytes"
        if self._is_prefix
        else "it is cut off"
      )
    taken = self._data[self.offset : end]
    self.offset = end
    return taken

  def uint32(self) -> int:
    return struct.unpack("<I", self.take(4))[0]

  def uint64(self) -> int:
    return struct.unpack("<Q", self.take(8))[0]

  def count(self, what: str, most: int = _MOST_ITEMS) -> int:
    found = self.uint64()
    if found > most:
      raise LoraxError(f"it claims {found:,} {what}, {most:,} at most")
    return found

  def text(self) -> str:
    return self.take(self.uint64()).decode("utf-8")

  def value(self, kind: _Type) -> Any:
    if kind == _Type.STRING:
      return self.text()
    if kind == _Type.ARRAY:
      return self._list(_Type(self.uint32()))
    return self._numbers(kind, 1)[0]

  def _list(self, kind: _Type) -> list[Any]:
    count = self.count("items of one list")
    if kind == _Type.STRING:
      return [self.text() for _ in range(count)]
    if kind == _Type.ARRAY:
      raise LoraxError("a list in it holds lists, which is not read")
    return self._numbers(kind, count)

  def _numbers(self, kind: _Type, count: int) -> list[Any]:
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    found = np.frombuffer(self.take(count * dtype.itemsize), dtype)
    if kind == _Type.FLOAT32:
      # The shortest decimal of the float32: 1e-05, not 9.999999747378752e-06.
      return [float(str(x)) for x in found]
    return found.tolist()


def _parse(path: Path, cursor: _Cursor, status: os.stat_result) -> Header:
  if cursor.take(4) != b"GGUF":
    raise LoraxError("it is no GGUF file")
  version = cursor.uint32()
  if version not in (2, 3):
    big = "big-endian, or " * (version & 0xFFFF == 0)
    raise LoraxError(f"it is {big}of GGUF version {version}; 2 and 3 are read")
  tensor_count = cursor.count("tensors")
  metadata: dict[str, Any] = {}
  for _ in range(cursor.count("values")):
    name = cursor.text()
    if name in metadata:
      raise LoraxError(f"it has the value {name!r} twice")
    with prefixed(f"{name!r}", ValueError):
      metadata[name] = cursor.value(_Type(cursor.uint32()))
  entries: dict[str, tuple[Any, tuple[int, ...], int]] = {}
  for _ in range(tensor_count):
    name = cursor.text()
    if name in entries:
      raise LoraxError(f"it has {name!r} twice")
    with prefixed(f"its entry of {name!r}", ValueError):
      entries[name] = _entry(cursor)
  alignment = metadata.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
  if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
    raise LoraxError(f"its {_ALIGNMENT} is {alignment!r}")
  first = _aligned(cursor.offset, alignment)
  tensors = {
    name: Tensor(kind, shape, first + offset)
    for name, (kind, shape, offset) in entries.items()
  }
  _check_places(tensors, first, alignment, status.st_size)
  return Header(path, metadata, tensors, status)


def _entry(cursor: _Cursor) -> tuple[gguf.GGMLQuantizationType, tuple[int, ...], int]:
  """A tensor's kind, its shape, and its offset in the data."""
  axes = cursor.uint32()
  if not 1 <= axes <= _MOST_AXES:
    raise LoraxError(f"it has {axes:,} axes")
  shape = tuple(cursor.uint64() for _ in range(axes))[::-1]
  kind = gguf.GGMLQuantizationType(cursor.uint32())
  block = gguf.GGML_QUANT_SIZES[kind][0]
  if not all(shape) or shape[-1] % block:
    raise LoraxError(f"{kind.name} of shape {shape}, in blocks of {block}")
  return kind, shape, cursor.uint64()


def _check_places(
  tensors: Mapping[str, Tensor], first: int, alignment: int, size: int
) -> None:
  """Checks that tensors follow one another, aligned, and end within the file."""
  offset = first
  for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
    if tensor.start != offset:
      raise LoraxError(
        f"{name!r} starts at byte {tensor.start - first:,} of the data, and what is"
        f" before it ends at {offset - first:,}"
      )
    if tensor.stop > size:
      raise LoraxError(
        f"{name!r} ends at byte {tensor.stop:,}, and the file has {size:,}: it is cut"
        " off"
      )
    offset = _aligned(tensor.stop, alignment)


def _aligned(offset: int, alignment: int) -> int:
  return -(-offset // alignment) * alignment
