"""The weights file of a PEFT folder: shapes first, and tensors one by one.

Old folders have what torch.save wrote, which torch_file.py reads without unpickling.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from lorax_flax.errors import LoraxError
from lorax_flax.hub import torch_file

WEIGHTS_FILE = "adapter_model.safetensors"
_OLD_FILE = "adapter_model.bin"

_DTYPES: Mapping[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True)
class Tensors:
  """An open file.

  Attributes:
    name: of the file.
    shapes: by key.
    dtypes: by key; None of one that holds no floating-point numbers.
    get: the tensor of a key.
  """

  name: str
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype | None]
  get: Callable[[str], np.ndarray]


@contextmanager
def opened(folder: Path) -> Iterator[Tensors]:
  """The weights of a folder. None, or damaged: LoraxError."""
  file = folder / WEIGHTS_FILE
  if not file.is_file():
    if not (folder / _OLD_FILE).is_file():
      raise LoraxError(f"no {file.name} and no {_OLD_FILE} in {folder}")
    yield _of_torch(folder / _OLD_FILE)
    return
  try:
    with safetensors.safe_open(file, "numpy") as source:
      slices = {key: source.get_slice(key) for key in source.keys()}  # noqa: SIM118
      yield Tensors(
        file.name,
        {key: tuple(part.get_shape()) for key, part in slices.items()},
        {key: _dtype(part.get_dtype()) for key, part in slices.items()},
        source.get_tensor,
      )
  except (safetensors.SafetensorError, OSError) as error:
    raise LoraxError(f"{file} is damaged or unreadable: {error}") from error


def _of_torch(file: Path) -> Tensors:
  tensors = torch_file.read(file)
  floating = {k: jnp.issubdtype(x.dtype, jnp.floating) for k, x in tensors.items()}
  return Tensors(
    file.name,
    {key: x.shape for key, x in tensors.items()},
    {key: x.dtype if floating[key] else None for key, x in tensors.items()},
    tensors.__getitem__,
  )


def _dtype(name: str) -> np.dtype | None:
  return np.dtype(_DTYPES[name]) if name in _DTYPES else None
