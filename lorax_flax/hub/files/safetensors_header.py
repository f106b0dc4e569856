"""The header of a safetensors file, read and written: its tensors and their offsets.

The format is the header's length in eight bytes, the header as JSON, and the tensors'
bytes one after another without holes. All of it is checked against the file's size
before anything is allocated.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lorax_flax.errors import LoraxError, prefixed, unknown
from lorax_flax.files import strict_json

# Bytes and dtype of numbers that take full bytes. Those without a dtype here (eight-bit
# floats, complex numbers) may be in a file, but are not read.
_DTYPES: Mapping[str, tuple[int, Any]] = {
  "BOOL": (1, np.bool_),
  "U8": (1, np.uint8),
  "I8": (1, np.int8),
  "U16": (2, np.uint16),
  "I16": (2, np.int16),
  "F16": (2, np.float16),
  "BF16": (2, ml_dtypes.bfloat16),
  "U32": (4, np.uint32),
  "I32": (4, np.int32),
  "F32": (4, np.float32),
  "U64": (8, np.uint64),
  "I64": (8, np.int64),
  "F64": (8, np.float64),
  "C64": (8, None),
  "F8_E4M3": (1, None),
  "F8_E4M3FNUZ": (1, None),
  "F8_E5M2": (1, None),
  "F8_E5M2FNUZ": (1, None),
  "F8_E8M0": (1, None),
}
_METADATA = "__metadata__"
_MOST_HEADER = 32 << 20
_MOST_AXES = 32
_MOST_LENGTH = 2**40  # of an axis; an empty tensor's other axes can claim anything


@dataclass(frozen=True)
class Stored:
  """A tensor in a file.

  Attributes:
    dtype: the file's name of it ("BF16").
    shape: of the tensor.
    start: offset of its first byte in the file.
  """

  dtype: str
  shape: tuple[int, ...]
  start: int

  @property
  def itemsize(self) -> int:
    return _DTYPES[self.dtype][0]

  @property
  def array_dtype(self) -> np.dtype:
    """The dtype of its arrays. Unsupported: LoraxError."""
    kind = _DTYPES[self.dtype][1]
    if kind is None:
      raise LoraxError(f"its numbers are {self.dtype}, which is not read")
    return np.dtype(kind)


def read(path: Path) -> tuple[dict[str, Stored], os.stat_result]:
  """The tensors of a file by key, and the file's status when it was read.

  Raises:
    LoraxError: a file that can't be read, or that is damaged in any way that its
      header or its length shows.
  """
  with (
    prefixed(f"cannot read {path}", OSError, ValueError),
    path.open("rb", buffering=0) as file,
  ):
    status = os.fstat(file.fileno())
    return _parse(_text(file, status.st_size), status.st_size), status


def write(
  tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
  """The first bytes of a file of these tensors, and the offset of each in the file.

  Args:
    tensors: by key, each with `shape` and `dtype`. The widest numbers come first, so
      that all are aligned.
    metadata: of the file.
  """
  names = {np.dtype(kind): n for n, (_, kind) in _DTYPES.items() if kind is not None}
  header: dict[str, Any] = {_METADATA: dict(metadata)}
  stop, starts = 0, {}
  for key in sorted(tensors, key=lambda key: -np.dtype(tensors[key].dtype).itemsize):
    dtype, shape = np.dtype(tensors[key].dtype), [*map(int, tensors[key].shape)]
    starts[key], stop = stop, stop + math.prod(shape) * dtype.itemsize
    offsets = [starts[key], stop]
    header[key] = {"dtype": names[dtype], "shape": shape, "data_offsets": offsets}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  first = len(text).to_bytes(8, "little") + text
  return first, {key: len(first) + start for key, start in starts.items()}


def _text(file: Any, size: int) -> bytes:
  prefix = file.read(8)
  length = int.from_bytes(prefix, "little")
  if len(prefix) < 8 or length > size - 8:
    raise LoraxError(f"it is cut off, or no safetensors file ({size:,} bytes)")
  if length > _MOST_HEADER:
    raise LoraxError(f"its header claims {length:,} bytes, {_MOST_HEADER:,} at most")
  text = file.read(length)
  if len(text) < length:
    raise LoraxError("it is cut off")
  return text


def _parse(text: bytes, size: int) -> dict[str, Stored]:
  header = strict_json.parse(text)
  if not isinstance(header, dict):
    raise LoraxError(f"its header is no object, but {header!r:.80}")
  metadata = header.pop(_METADATA, None) or {}
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise LoraxError(f"its {_METADATA} is no object of strings, but {metadata!r:.80}")
  first = 8 + len(text)
  found, ends = {}, {}
  for key, entry in header.items():
    with prefixed(f"the header's entry of {key!r}"):
      found[key], ends[key] = _entry(entry, first)
  # One after another, from the header's end to the file's: no hole, no overlap.
  offset = first
  for key in sorted(found, key=lambda key: (found[key].start, ends[key])):
    if found[key].start != offset:
      raise LoraxError(
        f"{key!r} starts at byte {found[key].start - first} of the data, and what is "
        f"before it ends at {offset - first}"
      )
    offset = ends[key]
  if offset != size:
    raise LoraxError(
      f"its tensors end at byte {offset:,}, and the file has {size:,}: it is cut off,"
      " or something was written behind them"
    )
  return found


def _entry(entry: Any, first: int) -> tuple[Stored, int]:
  """A tensor, and the offset behind its bytes."""
  if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
    raise LoraxError(f"it is not dtype, shape and data_offsets, but {entry!r:.80}")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise LoraxError(unknown("dtype", str(dtype), _DTYPES))
  if (
    not _are_counts(shape)
    or len(shape) > _MOST_AXES
    or any(n > _MOST_LENGTH for n in shape)
  ):
    raise LoraxError(f"its shape is {shape!r:.80}")
  if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise LoraxError(f"its data_offsets are {offsets!r:.80}")
  stored = Stored(dtype, tuple(shape), first + offsets[0])
  size = math.prod(shape) * stored.itemsize
  if size != offsets[1] - offsets[0]:
    raise LoraxError(
      f"{dtype} of shape {tuple(shape)} takes {size:,} bytes, and it has"
      f" {offsets[1] - offsets[0]:,}"
    )
  return stored, first + offsets[1]


def _are_counts(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(n) is int and n >= 0
    for n in values  # bool is an int
  )
