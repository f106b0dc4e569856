"""How each tensor of a PEFT folder lies, beside how our array of it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# A field of one of our deltas, or the base's own leaf.
Part = Literal["a", "b", "bias", "magnitude", "rows", "value", "original", "leaf"]


@dataclass(frozen=True)
class Form:
  """A stored tensor as a reordering of our array's axes.

  Attributes:
    axes: the stored axis that each of ours is; None: as they are.
    ones: stored axes of size 1 that ours lacks. `axes` counts without them.
    split: (rank, axis) where one stored axis holds experts and the rank, the experts
      outside on axis 0 (A of PEFT's ParamWrapper) and inside on axis 1 (its B); ours
      has two axes there, and `axes` counts both.
  """

  axes: tuple[int, ...] | None = None
  ones: tuple[int, ...] = ()
  split: tuple[int, int] | None = None

  def to_ours(self, stored: np.ndarray) -> np.ndarray:
    """The stored tensor as our array."""
    x = stored.squeeze(self.ones) if self.ones else stored
    if self.split is not None:
      rank, axis = self.split
      shape = list(x.shape)
      experts = shape[axis] // rank
      shape[axis : axis + 1] = [experts, rank] if axis == 0 else [rank, experts]
      x = x.reshape(shape)
    return x if self.axes is None else x.transpose(self.axes)

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    x = ours if self.axes is None else ours.transpose(np.argsort(self.axes))
    return x.reshape(self.stored_shape(ours.shape))

  def stored_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
    """The stored tensor's shape, by that of our array."""
    order = range(len(ours)) if self.axes is None else np.argsort(self.axes)
    shape = [ours[i] for i in order]
    if self.split is not None:
      axis = self.split[1]
      shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    for one in self.ones:
      shape.insert(one, 1)
    return tuple(shape)


AS_IS = Form()
_TURNED = Form((1, 0))

# What a module of each kind has beside its own weight: the end of the key, and what of
# our delta it is. "turned" is a linear layer whose weight is an embedding's: its A is
# our b, for ours are named by the look-up.
FACTORS: Mapping[str, Mapping[str, tuple[Part, Form]]] = {
  "linear": {
    "lora_A.weight": ("a", _TURNED),
    "lora_B.weight": ("b", _TURNED),
    "lora_B.bias": ("bias", AS_IS),
    "lora_magnitude_vector": ("magnitude", AS_IS),
  },
  "embedding": {
    "lora_embedding_A": ("a", _TURNED),
    "lora_embedding_B": ("b", _TURNED),
    "lora_magnitude_vector": ("magnitude", AS_IS),
  },
  "conv": {
    "lora_A.weight": ("a", Form((2, 3, 1, 0))),
    "lora_B.weight": ("b", Form((1, 0), ones=(2, 3))),
    "lora_B.bias": ("bias", AS_IS),
    "lora_magnitude_vector": ("magnitude", Form(ones=(0, 2, 3))),
  },
  "turned": {"lora_A.weight": ("b", AS_IS), "lora_B.weight": ("a", AS_IS)},
}


def expert_factors(rank: int) -> Mapping[str, tuple[Part, Form]]:
  """As `FACTORS`, of a stack of experts: PEFT's ParamWrapper."""
  return {
    "lora_A.weight": ("a", Form((0, 2, 1), split=(rank, 0))),
    "lora_B.weight": ("b", Form((2, 1, 0), split=(rank, 1))),
  }


# The roles of our kernel's axes, of one layer.
ROLES: Mapping[str, tuple[str, ...]] = {
  "linear": ("in", "out"),
  "embedding": ("in", "out"),
  "turned": ("in", "out"),
  "conv": ("in", "in", "in", "out"),
  "experts": ("stack", "in", "out"),
}


def part_shape(
  part: Part, shape: Sequence[int], roles: Sequence[str], rank: int
) -> tuple[int, ...]:
  """The shape of one part of a low-rank delta of a kernel."""
  by_role = {
    role: tuple(n for n, r in zip(shape, roles, strict=True) if r == role)
    for role in ("stack", "in", "out")
  }
  stack, ins, outs = by_role["stack"], by_role["in"], by_role["out"]
  if part == "a":
    return (*stack, *ins, rank)
  return (*stack, rank, *outs) if part == "b" else (*stack, *outs)
