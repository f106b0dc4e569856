"""GGUF files, written a tensor at a time by the gguf package."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.hub.files.gguf_blocks import FLOATS, Kind

# The kinds that are written, by the names that the commands have for them.
KINDS: Mapping[str, Kind] = {
  "f32": Kind.F32,
  "f16": Kind.F16,
  "bf16": Kind.BF16,
  "q8_0": Kind.Q8_0,
}
_FILE_TYPES = {
  Kind.F32: gguf.LlamaFileType.ALL_F32,
  Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
  Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
  Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


class Output(NamedTuple):
  """A tensor to be written.

  Attributes:
    value: its numbers, in any layout and dtype.
    kind: of the numbers in the file.
  """

  value: np.ndarray
  kind: Kind


def kind_of(name: str, value: np.ndarray, requested: str | None) -> Kind:
  """The kind that a tensor is written as: vectors and positions stay float32.

  Args:
    requested: a name of `KINDS`; None keeps the dtype of a matrix.

  Raises:
    LoraxError: rows that are no multiple of a block.
  """
  if value.ndim == 1 or name == "position_embd.weight":
    return Kind.F32
  kinds = {np.dtype(dtype): kind for kind, dtype in FLOATS.items()}
  kind = kinds[value.dtype] if requested is None else KINDS[requested]
  block = gguf.GGML_QUANT_SIZES[kind][0]
  if value.shape[-1] % block:
    raise LoraxError(
      f"{name!r} has rows of {value.shape[-1]} numbers, and {kind.name} takes blocks"
      f" of {block}: f32, f16 and bf16 take any"
    )
  return kind


def about(outputs: Iterable[Output]) -> dict[str, Any]:
  """Metadata of the kind that most numbers have."""
  sizes: Counter[Kind] = Counter()
  for value, kind in outputs:
    sizes[kind] += value.size
  (most, _), *_ = sizes.most_common(1)
  found = {gguf.Keys.General.FILE_TYPE: int(_FILE_TYPES[most])}
  if most not in FLOATS:
    found[gguf.Keys.General.QUANTIZATION_VERSION] = gguf.GGML_QUANT_VERSION
  return found


def write(
  path: Path,
  architecture: str,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, Output],
) -> None:
  """Writes a file.

  Args:
    architecture: llama.cpp's name.
    metadata: numbers, strings, truth values and lists of one of these; integers are
      written as uint32 and numbers as float32.
    tensors: by name.

  Raises:
    LoraxError: a number that its kind can't hold; it names the tensor.
  """
  writer = gguf.GGUFWriter(path, architecture)
  try:
    for name, value in metadata.items():
      add = next(add for kind, add in _ADDS if isinstance(value, kind))
      getattr(writer, add)(name, value)
    for name, (value, kind) in tensors.items():
      block, size = gguf.GGML_QUANT_SIZES[kind]
      # Any dtype but uint8, of which the package takes the shape for that of the bytes.
      dtype, count = np.dtype(np.float32), math.prod(value.shape) // block * size
      writer.add_tensor_info(name, value.shape, dtype, count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, output in tensors.items():
      writer.write_tensor_data(_encoded(name, output))
  finally:
    writer.close()


# Truth values first: they are integers too.
_ADDS = (
  (bool, "add_bool"),
  (int, "add_uint32"),
  (float, "add_float32"),
  (str, "add_string"),
  (list, "add_array"),
)


def decoded(name: str, output: Output) -> np.ndarray:
  """A tensor's numbers as they are read again, float32; errors as of `write`."""
  found = _encoded(name, output)
  if output.kind in FLOATS:
    return found.astype(np.float32)
  return gguf.quants.dequantize(found, output.kind)


def _encoded(name: str, output: Output) -> np.ndarray:
  value, kind = output
  if kind not in FLOATS:
    return gguf.quants.quantize(np.ascontiguousarray(value, np.float32), kind)
  with np.errstate(over="ignore"):
    found = np.ascontiguousarray(value.astype(FLOATS[kind], copy=False))
  if wrong := found.size - np.count_nonzero(np.isfinite(found)):
    raise LoraxError(
      f"{name!r} would be written with {wrong:,} of its {found.size:,} numbers NaN or"
      f" infinite: {kind.name} can't hold them"
    )
  return found
