"""Numbers in GGUF files: floats, and blocks of quantised ones, by the gguf package."""

from collections.abc import Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.hub.files import safetensors
from lorax_flax.hub.files.gguf_header import Header, Tensor

Kind = gguf.GGMLQuantizationType
FLOATS: Mapping[Kind, Any] = {
  Kind.F16: np.float16,
  Kind.BF16: ml_dtypes.bfloat16,
  Kind.F32: np.float32,
  Kind.F64: np.float64,
}
# What the gguf package dequantises.
QUANTISED = (
  *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
  *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
  *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
  *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
)
_NAMES = {*(kind.name for kind in FLOATS), *QUANTISED}


def check_readable(header: Header) -> None:
  """Refuses tensors of a kind that is not read, by their names."""
  for name, tensor in header.tensors.items():
    if tensor.kind.name not in _NAMES:
      message = unknown("quantisation", tensor.kind.name, _NAMES)
      raise LoraxError(f"{header.path}: {name!r} is not read: {message}")


def dtype(stored: Tensor) -> np.dtype:
  """The dtype of a tensor's numbers as they are read."""
  return np.dtype(FLOATS.get(stored.kind, np.float32))


def raw(descriptor: int, stored: Tensor, low: int, high: int) -> np.ndarray:
  """The bytes of rows of an open file's tensor, (rows, bytes); a vector is one row."""
  start = stored.start + low * stored.row_bytes
  data = np.empty((high - low, stored.row_bytes), np.uint8)
  safetensors.read_bytes(descriptor, start, data)
  return data


def rows(descriptor: int, stored: Tensor, low: int, high: int) -> np.ndarray:
  """Rows of an open file's tensor as floats; a vector is one row."""
  data = raw(descriptor, stored, low, high)
  if stored.kind in FLOATS:
    return data.view(FLOATS[stored.kind])
  # A damaged block can hold infinities, and their products with zero.
  with np.errstate(all="ignore"):
    return gguf.quants.dequantize(data, stored.kind)


def tensor(header: Header, name: str) -> np.ndarray:
  """A small tensor of one axis or two, read at once."""
  found = header.tensors[name]
  if len(found.shape) > 2:
    raise LoraxError(f"{header.path}: {name!r} has shape {found.shape}")
  count = found.shape[0] if len(found.shape) == 2 else 1
  with header.path.open("rb", buffering=0) as file:
    return rows(file.fileno(), found, 0, count).reshape(found.shape)
