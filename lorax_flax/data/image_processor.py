"""Images from files, resized and normalised by a checkpoint's preprocessor config.

Equal to transformers' ViTImageProcessor with Pillow. Shapes: C channels, H x W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lorax_flax.data.pixels import Normalization
from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.files import strict_json

FILE = "preprocessor_config.json"
_TYPES = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTFeatureExtractor")
_REFUSED = ("do_center_crop", "do_pad")


@dataclass(frozen=True)
class Processor:
  """Settings of a preprocessor_config.json.

  Attributes:
    size: (height, width) in pixels that images are resized to; None: they are not.
    resample: Pillow's number of the filter.
    normalization: of the resized pixels.
  """

  size: tuple[int, int] | None
  resample: int
  normalization: Normalization

  def resized(self, image: Image.Image) -> np.ndarray:
    """Pixels of an RGB image, uint8 CxHxW."""
    if self.size is not None:
      height, width = self.size
      image = image.resize((width, height), resample=Image.Resampling(self.resample))
    return np.moveaxis(np.asarray(image), -1, 0)


def load(folder: Path) -> Processor:
  """The processor of a checkpoint's folder; a field that is absent has ViT's default.

  Raises:
    LoraxError: there is no such file, or one that asks for what is not built here.
  """
  file = folder / FILE
  if not file.is_file():
    raise LoraxError(
      f"no {FILE} in {folder}, which says how images are resized and normalised"
    )
  fields = strict_json.read_object(file)
  name = fields.get("image_processor_type") or fields.get("feature_extractor_type")
  if name is not None and name not in _TYPES:
    raise LoraxError(f"{file}: {unknown('image_processor_type', str(name), _TYPES)}")
  for option in _REFUSED:
    if fields.get(option):
      raise LoraxError(f"{file}: {option} is not built here")
  return Processor(
    _size(file, fields) if fields.get("do_resize", True) else None,
    _filter(file, fields),
    Normalization(
      _number(file, fields, "rescale_factor", 1 / 255)
      if fields.get("do_rescale", True)
      else None,
      *(
        _channels(file, fields, option)
        if fields.get("do_normalize", True)
        else (default,) * 3
        for option, default in (("image_mean", 0.0), ("image_std", 1.0))
      ),
    ),
  )


def read_image(file: Path) -> Image.Image:
  """The image of a file, upright and in RGB, as transformers reads it.

  Transparency is dropped, grey and palettes are converted, EXIF's orientation is
  applied.

  Raises:
    LoraxError: no such file, none that is an image, or one with more than 8 bits a
      channel, of which Pillow's conversion would make white.
  """
  if not file.is_file():
    raise LoraxError(f"no file {file}")
  try:
    with Image.open(file) as opened:
      image = ImageOps.exif_transpose(opened)
      image.load()
  except Exception as error:  # Pillow's decoders raise errors of many kinds.
    raise LoraxError(f"{file} can't be read as an image: {error}") from error
  if image.mode.startswith(("I", "F")):
    raise LoraxError(
      f"{file} has more than 8 bits a channel (mode {image.mode}): save it with 8"
    )
  return image.convert("RGB")


def _size(file: Path, fields: Mapping[str, Any]) -> tuple[int, int]:
  size = fields.get("size", 224)
  pair = (size, size) if isinstance(size, int) else None
  if isinstance(size, dict) and size.keys() == {"height", "width"}:
    pair = (size["height"], size["width"])
  if pair is None or not all(type(n) is int and n > 0 for n in pair):
    raise LoraxError(f"{file}: size is a height and a width here, not {size!r:.80}")
  return pair


def _number(file: Path, fields: Mapping[str, Any], name: str, default: float) -> float:
  value = fields.get(name, default)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise LoraxError(f"{file}: {name} is a number, not {value!r:.80}")
  return value


def _filter(file: Path, fields: Mapping[str, Any]) -> int:
  value = fields.get("resample", Image.Resampling.BILINEAR)
  known = [int(each) for each in Image.Resampling]
  if value not in known:
    raise LoraxError(
      f"{file}: resample is one of {listing(map(str, known))}, not {value!r:.80}"
    )
  return int(value)


def _channels(file: Path, fields: Mapping[str, Any], name: str) -> tuple[float, ...]:
  value = fields.get(name, 0.5)
  values = value if isinstance(value, list) else [value] * 3
  if len(values) != 3 or not all(type(x) in (int, float) for x in values):
    raise LoraxError(
      f"{file}: {name} is a number for each of 3 channels: {value!r:.80}"
    )
  return tuple(map(float, values))
