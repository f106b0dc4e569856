"""Images as model inputs: all of one size, so that none is padded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_flax.data.tokens import Batch, marks
from lorax_flax.errors import LoraxError

INPUT = "pixel_values"


@dataclass(frozen=True)
class Normalization:
  """Numbers of pixels, in float32: (factor · pixel - mean) / std.

  Attributes:
    factor: None multiplies by none.
    mean, std: of each channel.
  """

  factor: float | None
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __call__(self, pixels_CxHxW: np.ndarray) -> np.ndarray:
    """CxHxW float32 of uint8, rounded where transformers rounds."""
    x_CxHxW = pixels_CxHxW
    if self.factor is not None:
      x_CxHxW = x_CxHxW.astype(np.float64) * self.factor
    mean_Cx1x1, std_Cx1x1 = (
      np.asarray(values, np.float32)[:, None, None] for values in (self.mean, self.std)
    )
    return (x_CxHxW.astype(np.float32) - mean_Cx1x1) / std_Cx1x1


@dataclass(frozen=True)
class Pixels:
  """N images.

  Attributes:
    values_NxCxHxW: float32, a list of its images or an array; or uint8, which
      `normalization` makes float32 in a batch: a quarter of the memory.
    labels_N: int32 classes; None where there are none.
  """

  values_NxCxHxW: Sequence[np.ndarray] | np.ndarray
  labels_N: np.ndarray | None = None
  normalization: Normalization | None = None

  def __len__(self) -> int:
    return len(self.values_NxCxHxW)

  @property
  def lengths_N(self) -> np.ndarray:
    """Ones: all images have the same length."""
    return np.ones(len(self), np.int64)

  def batch(self, index_B: np.ndarray, length: int) -> Batch:
    """A batch.

    Returns:
      pixel_values: float32 (B, C, H, W), zeros in a padding row; labels (if any): int32
      (B,); weights, index: as of `Tokens.batch`.
    """
    del length
    shape = self.values_NxCxHxW[0].shape
    out_BxCxHxW = np.zeros((len(index_B), *shape), np.float32)
    for row, index in enumerate(index_B):
      if index >= 0:
        image = self.values_NxCxHxW[index]
        out_BxCxHxW[row] = self.normalization(image) if self.normalization else image
    batch = {INPUT: out_BxCxHxW}
    if self.labels_N is not None:
      batch["labels"] = np.where(index_B >= 0, self.labels_N[index_B], np.int32(0))
    return batch | marks(index_B)

  def part(self, start: int, stop: int) -> "Pixels":
    """The images from `start` to `stop`."""
    labels_N = None if self.labels_N is None else self.labels_N[start:stop]
    return Pixels(self.values_NxCxHxW[start:stop], labels_N, self.normalization)


def from_nested(values: Any) -> np.ndarray:
  """Nested lists of numbers as a float32 array; ragged or not numbers: LoraxError."""
  try:
    array = np.asarray(values)
  except (ValueError, OverflowError) as error:
    raise LoraxError(f"{INPUT} are lists of different lengths") from error
  if array.dtype.kind not in "fiu":
    raise LoraxError(f"{INPUT} hold a value that is not a number")
  with np.errstate(over="ignore"):  # infinities are refused later
    return array.astype(np.float32)


def from_inputs(
  examples: Sequence[Mapping[str, np.ndarray]], shape: Sequence[int]
) -> Pixels:
  """Rows of model inputs: `{"pixel_values": …}`, each of the shape (C, H, W).

  Raises:
    LoraxError: another shape, or a number that is not finite; it names the example,
      counted from 1.
  """
  for number, example in enumerate(examples, 1):
    image = example[INPUT]
    if image.shape != tuple(shape):
      raise LoraxError(
        f"example {number}: {INPUT} have the shape {image.shape}, and this model takes"
        f" {tuple(shape)}: channels, height, width"
      )
    if not np.isfinite(image).all():
      raise LoraxError(f"example {number}: {INPUT} hold a number that is not finite")
  return Pixels([example[INPUT] for example in examples])
