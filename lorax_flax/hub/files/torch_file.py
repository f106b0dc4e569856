"""State dicts that torch.save wrote, read without torch and without running a pickle.

A file is a zip archive (torch 1.6 and later): ARCHIVE/data.pkl describes the tensors as
views of storages, and ARCHIVE/data/KEY are the storages' bytes. `unpickle.py` reads the
former, and calls only functions of this file.
"""

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.hub.files.unpickle import run

# Keys under which checkpoints nest their state dict.
_WRAPPERS = ("model_state_dict", "state_dict")
_MAGIC = b"PK\x03\x04"
_MOST_PICKLE = 16 * 2**20
_MOST_AXES = 32
_DTYPES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}


def is_torch_file(path: Path) -> bool:
  """True where a file starts as torch's zip archives do."""
  with path.open("rb") as file:
    return file.read(4) == _MAGIC


def read(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors of a state dict, in its order; a nested "state_dict" is opened.

  Nothing in the file is executed. Memory is the file's size: tensors are read-only
  views of what was read, and share storages as they did.

  Raises:
    LoraxError: not torch's zip format, a damaged file, or anything in it that is not a
      tensor; the message names it.
  """
  path = Path(path).expanduser()
  try:
    with _Bounded(path) as file:
      archive = _Archive(file)
      return _tensors(run(archive.program(), _GLOBALS, archive.storage))
  except LoraxError as error:
    raise LoraxError(f"cannot read {path}: {error}") from error
  except (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,  # encrypted, or an unknown compression
  ) as error:
    raise LoraxError(f"cannot read {path}, it is damaged: {error}") from error


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a state dict that torch.load(path, weights_only=True) reads."""
  names = {dtype: name for name, dtype in _DTYPES.items()}
  program = [b"\x80\x02", _ORDERED_DICT, b"("]
  for number, (key, value) in enumerate(tensors.items()):
    if value.dtype not in names:
      raise LoraxError(f"{key} holds {value.dtype}, which torch files do not")
    storage = f"torch\n{names[value.dtype]}\n".encode()
    strides = [step // value.itemsize for step in np.ascontiguousarray(value).strides]
    program += [_text(key), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
    program += [_text("storage"), b"c", storage, _text(str(number)), _text("cpu")]
    program += [_int(value.size), b"tQ", _int(0)]
    program += [b"(", *map(_int, value.shape), b"t(", *map(_int, strides), b"t"]
    program += [b"\x89", _ORDERED_DICT, b"tR"]
  program.append(b"u.")
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", b"".join(program))
    archive.writestr("archive/byteorder", b"little")
    for number, value in enumerate(tensors.values()):
      archive.writestr(f"archive/data/{number}", value.tobytes())
    archive.writestr("archive/version", b"3\n")


_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _text(value: str) -> bytes:
  """The instruction that pushes a text."""
  data = value.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
  """The instruction that pushes a number of up to eight bytes."""
  return b"\x8a\x08" + struct.pack("<q", value)


def _tensors(found: Any) -> dict[str, np.ndarray]:
  if isinstance(found, dict) and len(found) == 1:
    (name, inner), *_ = found.items()
    if name in _WRAPPERS and isinstance(inner, dict):
      found = inner
  if not isinstance(found, dict):
    raise LoraxError(f"it holds a {type(found).__name__}, not a state dict")
  for name, value in found.items():
    if not isinstance(value, np.ndarray):
      raise LoraxError(f"{name!r} is a {type(value).__name__}, not a tensor")
  return dict(found)


@dataclass(frozen=True)
class _StorageType:
  dtype: np.dtype


@dataclass(frozen=True)
class _Storage:
  """A storage's numbers on one axis, and the maximal bytes of a tensor of it."""

  values: np.ndarray
  most_bytes: int


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None):
  """A tensor as torch describes it: a view of its storage, checked to be within."""
  del requires_grad, hooks
  if metadata:
    raise LoraxError("a tensor in it is conjugated or negated lazily")
  shape_ok = (
    isinstance(storage, _Storage)
    and isinstance(size, tuple)
    and isinstance(stride, tuple)
    and len(size) == len(stride) <= _MOST_AXES
    and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
  )
  if not shape_ok:
    raise LoraxError("a tensor in it has no proper shape")
  values = storage.values
  count = math.prod(size)
  if count * values.itemsize > storage.most_bytes:
    raise LoraxError("a tensor in it is larger than the file")
  last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
  if count and last >= values.size:
    raise LoraxError("a tensor in it reaches beyond its storage")
  if not count:
    return np.empty(size, values.dtype)
  # The step along an axis of one is never taken, and may be any number.
  steps = [
    step * values.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)
  ]
  return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


def _parameter(data, requires_grad, hooks):
  del requires_grad, hooks
  if not isinstance(data, np.ndarray):
    raise LoraxError("a parameter in it is no tensor")
  return data


def _ordered_dict(items=()):
  if items != ():
    raise LoraxError("a dict in it is made of something")
  return {}


_GLOBALS = {
  "collections.OrderedDict": _ordered_dict,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_parameter": _parameter,
  **{f"torch.{name}": _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Bounded(io.BufferedReader):
  """A file whose reads are cut to its size.

  Python would allocate as much as a damaged archive claims.
  """

  def __init__(self, path: Path):
    super().__init__(io.FileIO(path))
    self.size = path.stat().st_size

  def read(self, size: int | None = -1) -> bytes:
    left = max(0, self.size - self.tell())
    return super().read(left if size is None or size < 0 else min(size, left))


class _Archive:
  """The zip archive, whose sizes are checked against the file's own."""

  def __init__(self, file: _Bounded):
    self._size = file.size
    if file.read(4) != _MAGIC:
      raise LoraxError(
        "it is not the zip format of torch 1.6 and later; older files are not read:"
        " load it in torch and save it again"
      )
    self._zip = zipfile.ZipFile(file)
    self._storages: dict[str, np.ndarray] = {}
    entries = self._zip.infolist()
    if sum(entry.file_size for entry in entries) > self._size:
      raise LoraxError("its entries are larger than the file")
    names = [e.filename for e in entries]
    programs = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(programs) != 1 or len(set(names)) < len(names):
      raise LoraxError("it holds no state dict: not one data.pkl, or a name twice")
    self._names = set(names)
    self._root = programs[0].partition("/")[0]
    order = f"{self._root}/byteorder"
    if order in self._names and self._bytes(order) != b"little":
      raise LoraxError("its bytes are not in little-endian order")

  def _bytes(self, name: str) -> bytes:
    entry = self._zip.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
      raise LoraxError(f"{name} is compressed, which torch does not do")
    return self._zip.read(entry)

  def program(self) -> bytes:
    name = f"{self._root}/data.pkl"
    if self._zip.getinfo(name).file_size > _MOST_PICKLE:
      raise LoraxError(f"{name} is larger than {_MOST_PICKLE} bytes")
    return self._bytes(name)

  def storage(self, reference: Any) -> _Storage:
    """The storage of a persistent id."""
    match reference:
      case ("storage", _StorageType(dtype), str(key), str(_), int(count)):
        pass
      case _:
        raise LoraxError("a persistent id in it names no storage")
    if key not in self._storages:
      name = f"{self._root}/data/{key}"
      if name not in self._names:
        raise LoraxError(f"the storage {name} is missing")
      self._storages[key] = np.frombuffer(self._bytes(name), np.uint8)
    held = self._storages[key]
    if count < 0 or count * dtype.itemsize != held.size:
      raise LoraxError(
        f"storage {key} has {held.size} bytes, not {count} of {dtype.name}"
      )
    return _Storage(held.view(dtype), self._size)
