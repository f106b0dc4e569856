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
    stored = {_key(key): key for key in reader}
    return Tensors(
      WEIGHTS_FILE,
      {key: reader.shape(own) for key, own in stored.items()},
      {key: reader.dtype(own) for key, own in stored.items()},
      lambda key: reader[stored[key]],
    )
  if not (folder / _OLD_FILE).is_file():
    raise LoraxError(f"no {WEIGHTS_FILE} and no {_OLD_FILE} in {folder}")
  tensors = {_key(k): x for k, x in torch_file.read(folder / _OLD_FILE).items()}
  return Tensors(
    _OLD_FILE,
    {key: x.shape for key, x in tensors.items()},
    {key: x.dtype for key, x in tensors.items()},
    tensors.__getitem__,
  )


def _key(stored: str) -> str:
  """A key as PEFT writes it: it reads magnitudes under their module's name too."""
  magnitude = "lora_magnitude_vector"
  return stored.removesuffix(".weight") if magnitude in stored else stored
