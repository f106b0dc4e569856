"""Models in GGUF files: their config, as config.json would have it, and weights.

Quantised tensors are dequantised to float32 as they are read, some rows at a time.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.errors import LoraxError, prefixed
from lorax_flax.hub.files import gguf_blocks, gguf_config, gguf_header, safetensors
from lorax_flax.hub.files.gguf_architectures import TensorForm
from lorax_flax.hub.files.gguf_header import Header, Tensor

_CHUNK = 1 << 18  # numbers that are dequantised at once


def read_config(path: Path) -> dict[str, Any]:
  """The config.json that corresponds to a GGUF file.

  Raises:
    LoraxError: a damaged file, or an error of `gguf_config.of_header`.
  """
  return gguf_config.of_header(gguf_header.read(path))


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor as it is read.

  Attributes:
    tensor: as the file has it.
    form: of it, beside Hugging Face's.
  """

  tensor: Tensor
  form: TensorForm

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape[::-1] if self.form.transposed else self.tensor.shape

  @property
  def blocks(self) -> str | None:
    """The name of its blocks; None: it is numbers."""
    kind = self.tensor.kind
    return None if kind in gguf_blocks.FLOATS else kind.name.lower()

  @property
  def array_dtype(self) -> np.dtype:
    return gguf_blocks.dtype(self.tensor)


def open_file(path: Path) -> safetensors.Reader:
  """Opens the weights of a file, by Hugging Face's keys; quantised ones are float32.

  Raises:
    LoraxError: an error of `read_config`, or a tensor of an unknown name or kind.
  """
  header = gguf_header.read(path)
  gguf_blocks.check_readable(header)
  file = safetensors.File(path, _named(header), header.status, _fill, _rows)
  return safetensors.of_file(file)


def _named(header: Header) -> dict[str, Stored]:
  """The tensors under Hugging Face's names."""
  config = gguf_config.of_header(header)
  architecture = gguf_config.architecture_of(header)
  found: dict[str, Stored] = {}
  for name, tensor in header.tensors.items():
    if name in architecture.rope_tensors:  # config.json has these numbers.
      continue
    with prefixed(str(header.path)):
      module, key = architecture.hf_name(name)
    if len(tensor.shape) > 2:
      raise LoraxError(f"{header.path}: {name!r} has shape {tensor.shape}")
    form = architecture.form(module, config, len(tensor.shape))
    if form.heads is not None and not (
      type(form.heads) is int
      and form.heads > 0
      and tensor.shape[0] % (2 * form.heads) == 0
    ):
      raise LoraxError(
        f"{header.path}: {name!r} has shape {tensor.shape}, which {form.heads!r} heads"
        " do not divide"
      )
    found[key] = Stored(tensor, form)
  return found


def _rows(descriptor: int, stored: Stored) -> np.ndarray:
  """The bytes of a tensor in blocks, its rows in Hugging Face's order."""
  count = stored.tensor.shape[0]
  data = gguf_blocks.raw(descriptor, stored.tensor, 0, count)
  return data[np.argsort(stored.form.row_order(count))]


def _fill(
  descriptor: int, stored: Stored, index: safetensors.Index, out: np.ndarray
) -> None:
  """Fills `out` with a part of a tensor, some rows at a time."""
  tensor, form = stored.tensor, stored.form
  if form.transposed:
    index, out = index[::-1], out.T
  order = np.argsort(form.row_order(tensor.shape[0]))[index[0]]
  if len(tensor.shape) == 1:
    vector = gguf_blocks.rows(descriptor, tensor, 0, 1)[0][order]
    out[...] = vector.astype(np.float32) - form.offset if form.offset else vector
    return
  step = max(1, _CHUNK // tensor.shape[1])
  for i in range(0, len(order), step):
    chunk = order[i : i + step]
    low, high = int(chunk.min()), int(chunk.max()) + 1
    rows = gguf_blocks.rows(descriptor, tensor, low, high)
    out[i : i + step] = rows[chunk - low, index[1]]
