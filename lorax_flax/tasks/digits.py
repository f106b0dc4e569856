"""Classification of scikit-learn's digits, 1,797 scanned images of 8 × 8 pixels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lorax_flax.data.config import DataSettings
from lorax_flax.data.own.labels import CLASSES, Labels
from lorax_flax.data.own.splits import TRAIN
from lorax_flax.tasks import images
from lorax_flax.tasks.task import OwnTask, Task

if TYPE_CHECKING:
  from PIL.Image import Image

_HELD_OUT = 5  # one of so many


def task(first: int, last: int) -> OwnTask:
  """The task that tells some of the digits apart."""
  name = f"digits_{first}_{last}"
  return OwnTask(name, DataSettings, functools.partial(_open, name, first, last))


def _open(name: str, first: int, last: int, settings: DataSettings) -> Task:
  """The task; every fifth image is held out."""
  import sklearn.datasets

  digits = sklearn.datasets.load_digits()
  chosen_N = np.flatnonzero((digits.target >= first) & (digits.target <= last))
  held_out_N = np.arange(len(chosen_N)) % _HELD_OUT == 0
  numbers = {TRAIN: chosen_N[~held_out_N], "validation": chosen_N[held_out_N]}
  values = {
    split: (digits.target[rows] - first).astype(np.int32)
    for split, rows in numbers.items()
  }
  names = tuple(map(str, range(first, last + 1)))
  pixels_NxHxW = np.round(digits.images * (255 / digits.images.max())).astype(np.uint8)
  return images.of_images(
    name,
    settings,
    Labels(CLASSES, names, values),
    {
      split: [functools.partial(_image, pixels_NxHxW[row]) for row in rows]
      for split, rows in numbers.items()
    },
    lambda: ["scikit-learn's digits"],
  )


def _image(pixels_HxW: np.ndarray) -> Image:
  from PIL import Image

  return Image.fromarray(pixels_HxW).convert("RGB")
