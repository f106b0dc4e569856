"""The weights file of a PEFT folder: shapes first, tensors on access.

Old folders have a file of torch.save, which torch_file.py reads without unpickling.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.hub.files import torch_file
from lorax_flax.hub.files.safetensors import open_file

WEIGHTS_FILE = "adapter_model.safetensors"
_OLD_FILE = "adapter_model.bin"


@dataclass(frozen=True)
class Tensors:
  """An open file.

  Attributes:
    name: of the file.
    shapes, dtypes: by key.
    get: reads the tensor of a key.
  """

  name: str
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype]
  get: Callable[[str], np.ndarray]


def opened(folder: Path) -> Tensors:
  """Opens the weights of a folder. Missing or damaged: LoraxError."""
  if (folder / WEIGHTS_FILE).is_file():
    reader = open_file(folder / WEIGHTS_FILE)
    return Tensors(
      WEIGHTS_FILE,
      {key: reader.shape(key) for key in reader},
      {key: reader.dtype(key) for key in reader},
      reader.__getitem__,
    )
  if not (folder / _OLD_FILE).is_file():
    raise LoraxError(f"no {WEIGHTS_FILE} and no {_OLD_FILE} in {folder}")
  tensors = torch_file.read(folder / _OLD_FILE)
  return Tensors(
    _OLD_FILE,
    {key: x.shape for key, x in tensors.items()},
    {key: x.dtype for key, x in tensors.items()},
    tensors.__getitem__,
  )
