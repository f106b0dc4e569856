"""A case of the GPU benchmark: what one side computes once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from benchmarks.common import Shape

# Of the decoding: tokens of each prompt, and tokens after it.
PROMPT, NEW = 512, 128


@dataclass(frozen=True)
class Case:
  """One computation of a side.

  Attributes:
    side: "lorax_flax" or "peft".
    task: "train" or "decode".
    method: "lora", "qlora" or "full".
    segments: number of texts that are packed into a row.
    scan: whether our layers are scanned.
    remat: what is recomputed: ours, or any but "none" for gradient checkpointing.
  """

  side: str
  task: str
  shape: Shape
  method: str
  segments: int = 1
  scan: bool = False
  remat: str = "none"
  steps: int = 5

  @classmethod
  def of(cls, fields: Mapping[str, Any]) -> Self:
    return cls(**{**fields, "shape": Shape(**fields["shape"])})

  def segments_T(self) -> np.ndarray:
    """The number of each token's text in its row, from 1 on."""
    return np.arange(self.shape.length) * self.segments // self.shape.length + 1
