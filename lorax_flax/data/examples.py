"""Examples: a task's texts and labels, or a user's own lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict


class Example(TypedDict):
  """One text or pair of texts. `label` is a class number, or a float (regression)."""

  text: str
  text_pair: NotRequired[str | None]
  label: NotRequired[int | float]


@dataclass(frozen=True)
class Splits:
  """A task's examples: the training split, and each evaluation split by name."""

  train: Sequence[Example]
  evaluation: dict[str, Sequence[Example]]
