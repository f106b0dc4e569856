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
_QUANTISED = tuple(
  Kind[name]
  for name in (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
  )
)
_NAMES = {kind.name for kind in (*FLOATS, *_QUANTISED)}


def check_readable(header: Header) -> None:
  """Refuses tensors of a kind that is not read, by their names."""
  for name, tensor in header.tensors.items():
    if tensor.kind.name not in _NAMES:
      message = unknown("quantisation", tensor.kind.name, _NAMES)
      raise LoraxError(f"{header.path}: {name!r} is not read: {message}")


def dtype(tensor: Tensor) -> np.dtype:
  """The dtype of a tensor's numbers as they are read."""
  return np.dtype(FLOATS.get(tensor.kind, np.float32))


def rows(descriptor: int, tensor: Tensor, low: int, high: int) -> np.ndarray:
  """Rows of an open file's tensor as floats; a vector is one row."""
  start = tensor.start + low * tensor.row_bytes
  data = np.empty((high - low, tensor.row_bytes), np.uint8)
  safetensors.read_bytes(descriptor, start, data)
  if tensor.kind in FLOATS:
    return data.view(FLOATS[tensor.kind])
  # A damaged block can hold infinities, and their products with zero.
  with np.errstate(all="ignore"):
    return gguf.quants.dequantize(data, tensor.kind)


def vector(header: Header, name: str) -> np.ndarray | None:
  """A small tensor of one axis, read at once; None where the file has none."""
  if (tensor := header.tensors.get(name)) is None:
    return None
  if len(tensor.shape) != 1:
    raise LoraxError(f"{header.path}: {name!r} has shape {tensor.shape}")
  with header.path.open("rb", buffering=0) as file:
    return rows(file.fileno(), tensor, 0, 1)[0]
