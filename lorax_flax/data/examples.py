"""Examples: a task's texts and labels, or a user's own lines."""

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, NotRequired, TypedDict, TypeVar

Rows = TypeVar("Rows")


class Example(TypedDict):
  """One text or pair of texts. `label` is a class number, or a float (regression)."""

  text: str
  text_pair: NotRequired[str | None]
  label: NotRequired[int | float]


class Splits(NamedTuple, Generic[Rows]):
  """A task's rows: the training split, and each evaluation split by name."""

  train: Rows
  evaluation: Mapping[str, Rows]


Examples = Splits[Sequence[Example]]
