"""Classification of images: a user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorax_flax.data.config import DataSettings
from lorax_flax.data.own import image_folders, summary
from lorax_flax.data.own import labels as own_labels
from lorax_flax.data.own.labels import CLASSES, Labels
from lorax_flax.data.own.settings import OwnSettings
from lorax_flax.data.own.splits import TRAIN
from lorax_flax.data.own.table import Row, Table, text
from lorax_flax.data.own.usable import usable
from lorax_flax.data.pixels import INPUT, Pixels
from lorax_flax.errors import LoraxError, prefixed
from lorax_flax.tasks.task import OwnTask, Splits, Task
from lorax_flax.train import losses
from lorax_flax.train.objective import Objective, Throughput
from lorax_flax.train.report import of_classes

if TYPE_CHECKING:
  from PIL.Image import Image

  from lorax_flax.models.registry import Located, Outline

_NAME, _FORM = "images", "images"
_EXAMPLES = 3  # that are shown

# Images by split, each opened when it is called.
Images = Mapping[str, Sequence[Callable[[], "Image"]]]


@dataclass(frozen=True)
class ImagesSettings(OwnSettings):
  """Settings of a user's own images with labels.

  Attributes:
    path: a folder with a folder of images for each class, of which a share is held out;
      one with such folders in train/ and validation/ or test/; or a file (.csv, .jsonl,
      …) with the columns image, a path from the file's folder, and label.
  """


class _Sized(NamedTuple):
  """Rows by split, and (width, height) of all images before they were resized."""

  rows: Mapping[str, Pixels]
  sizes: Sequence[tuple[int, int]]


def of_images(
  name: str,
  settings: DataSettings,
  labels: Labels,
  images: Images,
  describe: Callable[[], list[str]],
) -> Task:
  """The task of images.

  Args:
    labels: classes of the images, by split.
    describe: lines on where they are from.

  Raises:
    LoraxError: settings of lengths in tokens.
  """
  for setting in ("max_length", "buckets"):
    if getattr(settings, setting) != getattr(DataSettings, setting):
      raise LoraxError(
        f"data.{setting} is of texts: the size of images is in the model's "
        "preprocessor_config.json"
      )
  # They are read to be trained on, and again to be described.
  read_once = functools.lru_cache(maxsize=1)(functools.partial(_read, labels, images))

  def read(_, model: Located) -> Splits:
    rows = dict(read_once(model.folder, _shape(model)).rows)
    return Splits(rows.pop(TRAIN), rows)

  def lines(_, model: Located) -> list[str]:
    shape = _shape(model)
    _, height, width = shape
    sizes = sorted(set(read_once(model.folder, shape).sizes), key=lambda x: x[0] * x[1])
    ends = dict.fromkeys(f"{wide} × {high}" for wide, high in (sizes[0], sizes[-1]))
    return [
      *describe(),
      *summary.of_labels(labels),
      f"images: {' to '.join(ends)} pixels; the model takes {width} × {height}",
    ]

  return Task(
    name=name,
    model="image-classification",
    num_labels=len(labels.names),
    labels=labels.names,
    settings=type(settings),
    read=read,
    blank=lambda model, length: _blank(model),
    objective=lambda label_smoothing: Objective(
      losses.cross_entropy(label_smoothing),
      ("accuracy", "macro_f1"),
      "accuracy",
      throughput=Throughput("images"),
      report=of_classes(labels.names),
    ),
    describe=lines,
  )


def _shape(model: Outline) -> tuple[int, ...]:
  """Channels, height and width of what the model takes."""
  return model.family.inputs(model.config)[INPUT].shape[1:]


def _blank(model: Outline) -> Pixels:
  """One image, for its shape."""
  return Pixels(np.zeros((1, *_shape(model)), np.float32), np.zeros(1, np.int32))


def _read(
  labels: Labels, images: Images, folder: Path, shape: tuple[int, ...]
) -> _Sized:
  # Here, since --help and mistakes in flags need not wait for it.
  from lorax_flax.data import image_processor

  processor = image_processor.load(folder)
  rows, sizes = {}, []
  for split, each in images.items():
    values_NxCxHxW = np.zeros((len(each), *shape), np.uint8)
    for number, opened in enumerate(each):
      image = opened()
      sizes.append(image.size)
      pixels_CxHxW = processor.resized(image)
      if pixels_CxHxW.shape != shape:
        raise LoraxError(
          f"{folder / image_processor.FILE} makes images of {pixels_CxHxW.shape}, and "
          f"the model takes {shape}: channels, height, width"
        )
      values_NxCxHxW[number] = pixels_CxHxW
    rows[split] = Pixels(values_NxCxHxW, labels.values[split], processor.normalization)
  return _Sized(rows, sizes)


def _open(settings: ImagesSettings) -> Task:
  """The task of the settings' files; raises LoraxError, which names the file."""
  path = settings.required_path(
    "which folder with a folder of images for each class, or which file of paths and "
    "labels?"
  )
  tables = image_folders.read_splits(path, settings.held_out, skip=settings.skips)
  chosen = usable(tables, settings, _FORM, _check)
  labels = own_labels.find(chosen, CLASSES)
  images = {split: _opened(table) for split, table in chosen.items()}

  def describe() -> list[str]:
    train = chosen[TRAIN]
    shown = [
      f"example: {row.values['image']} -> {row.values['label']}"
      for row in train.rows[:_EXAMPLES]
    ]
    return [
      *summary.of_files(tables, _FORM, settings.columns),
      *summary.of_skipped((table.file, table.bad) for table in chosen.values()),
      *shown,
    ]

  return of_images(_NAME, settings, labels, images, describe)


def _opened(table: Table) -> list[Callable[[], Image]]:
  for row in table.rows:
    text(table, row, "image")
  return [functools.partial(_open_image, table, row) for row in table.rows]


def _open_image(table: Table, row: Row) -> Image:
  from lorax_flax.data import image_processor

  name = text(table, row, "image")
  with prefixed(f"{table.file}: {row.place}"):
    folder = image_folders.folder_of(table)
    return image_processor.read_image(folder / Path(name).expanduser())


def _check(table: Table, row: Row) -> None:
  own_labels.check(table, row, CLASSES)
  _open_image(table, row)


TASK = OwnTask(_NAME, ImagesSettings, _open)
