"""The labels of a user's rows: classes, a number, or several classes at once."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lorax_flax.data.own.splits import TRAIN
from lorax_flax.data.own.table import Row, Table
from lorax_flax.errors import LoraxError, listing, nearest

CLASSES, NUMBER, SEVERAL = KINDS = ("classes", "number", "several")
_AS_NAMES = "or take all of them as names: --config.data.labels=classes"


@dataclass(frozen=True)
class Labels:
  """The labels of all splits.

  Attributes:
    kind: one of `KINDS`.
    names: of the classes: by number where all are integers, else by name; ("score",)
      of a number.
    values: by split: int32 (N,) classes, float32 (N,) numbers, or float32 (N, C) with
      1 for each class that a row has.
  """

  kind: str
  names: tuple[str, ...]
  values: Mapping[str, np.ndarray]

  def counts(self, split: str) -> dict[str, int]:
    """Number of rows with each class."""
    values = self.values[split]
    if self.kind == CLASSES:
      found_C = np.bincount(values, minlength=len(self.names))
    else:
      found_C = values.sum(0)
    return dict(zip(self.names, map(int, found_C), strict=True))


class _Label(NamedTuple):
  """A row's label, and the place of which an error is said."""

  place: str
  value: Any

  def error(self, message: str) -> LoraxError:
    return LoraxError(f"{self.place}: the label {self.value!r:.80} {message}")


def find(tables: Mapping[str, Table], kind: str | None = None) -> Labels:
  """The labels of tables, by their column "label".

  Args:
    tables: by split; each row has a label.
    kind: one of `KINDS`; None finds it. Names, integers and booleans are classes,
      numbers with a point are numbers, and lists are several classes at once. A text
      file's values are read as what they look like.

  Raises:
    LoraxError: labels of mixed types, one that is no label of that kind, a class that
      training has no row of, or one class alone; it names file and line.
  """
  labels = {split: list(_of_table(table)) for split, table in tables.items()}
  kind = kind or _kind([label for each in labels.values() for label in each])
  if kind == NUMBER:
    numbers = {
      split: np.asarray([_number(label) for label in each], np.float32)
      for split, each in labels.items()
    }
    return Labels(kind, ("score",), numbers)
  chosen = {
    split: [_several(x) if kind == SEVERAL else [_name(x, x.value)] for x in each]
    for split, each in labels.items()
  }
  names = _ordered({name for each in chosen[TRAIN] for name in each})
  if len(names) < 2:
    raise LoraxError(
      f"{tables[TRAIN].file}: a classifier needs two classes, and the rows to train on "
      f"have {f'the class {names[0]!r} alone' if names else 'none'}"
    )
  _check_trained(names, labels, chosen)
  index = {name: number for number, name in enumerate(names)}
  values = {}
  for split, each in chosen.items():
    if kind == CLASSES:
      values[split] = np.asarray([index[name] for [name] in each], np.int32)
    else:
      values[split] = np.zeros((len(each), len(names)), np.float32)
      for row, own in enumerate(each):
        values[split][row, [index[name] for name in own]] = 1.0
  return Labels(kind, names, values)


def check(table: Table, row: Row, kind: str | None) -> None:
  """Raises LoraxError for a row's label that is none, whatever the other rows' are.

  Args:
    kind: as of `find`.
  """
  label = _of_row(table, row)
  if kind == NUMBER or (kind is None and _type(label) == "a number"):
    _number(label)
  elif kind == SEVERAL or isinstance(label.value, list):
    _several(label)
  else:
    _name(label, label.value)


def _of_table(table: Table) -> Iterator[_Label]:
  return (_of_row(table, row) for row in table.rows)


def _of_row(table: Table, row: Row) -> _Label:
  value = row.values["label"]
  value = value.strip() if isinstance(value, str) else value
  return _Label(f"{table.file}: {row.place}", value)


def _type(label: _Label) -> str:
  """The type that a label looks to be of: "a name", "an integer", …."""
  value = label.value
  if isinstance(value, bool):
    return "a boolean"
  if isinstance(value, int) or (isinstance(value, str) and _is_integer(value)):
    return "an integer"
  if isinstance(value, float) or (isinstance(value, str) and _is_number(value)):
    return "a number"
  if isinstance(value, str | list):
    return "a name" if isinstance(value, str) else "a list"
  raise label.error("is no name, number, boolean or list of names")


def _kind(labels: Sequence[_Label]) -> str:
  types = [_type(label) for label in labels]
  found = Counter(types)
  if found.keys() <= {"an integer", "a number"} and "a number" in found:
    return NUMBER
  if len(found) == 1:
    return SEVERAL if "a list" in found else CLASSES
  usual, count = found.most_common(1)[0]
  odd = labels[next(i for i, name in enumerate(types) if name != usual)]
  rest = "" if "a list" in found else f"; mend it, {_AS_NAMES}"
  raise odd.error(f"is {_type(odd)}, and {count:,} other rows have {usual}{rest}")


def _is_integer(text: str) -> bool:
  return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def _is_number(text: str) -> bool:
  """True for a number, which may not be finite."""
  try:
    float(text)
  except ValueError:
    return False
  return "_" not in text


def _number(label: _Label) -> np.float32:
  value = label.value
  if isinstance(value, bool | list) or _type(label) == "a name":
    raise label.error("is no number")
  with np.errstate(over="ignore"):
    found = np.float32(value)
  if not np.isfinite(found):
    raise label.error("is no finite number")
  return found


def _name(label: _Label, value: Any) -> str:
  """The name of a class."""
  if value == "":
    raise LoraxError(f"{label.place} has no label: it is empty")
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float):
    if not math.isfinite(value):
      raise label.error("is no class")
    return str(int(value)) if value.is_integer() else str(value)
  if not isinstance(value, int | str):
    raise label.error("is no class")
  return str(value)


def _several(label: _Label) -> list[str]:
  """The names of a row's classes; those of a text are separated by commas."""
  value = label.value
  if isinstance(value, str):
    value = [name.strip() for name in value.split(",")] if value else []
  if not isinstance(value, list):
    raise label.error("is no list of names")
  return list(dict.fromkeys(_name(label, name) for name in value))


def _ordered(names: set[str]) -> tuple[str, ...]:
  key: Any = int if all(map(_is_integer, names)) else None
  return tuple(sorted(sorted(names), key=key))


def _check_trained(
  names: Sequence[str],
  labels: Mapping[str, Sequence[_Label]],
  chosen: Mapping[str, Sequence[Sequence[str]]],
) -> None:
  known = frozenset(names)
  for split, each in labels.items():
    for label, own in zip(each, chosen[split], strict=True):
      for name in own:
        if name not in known:
          near = nearest(name, names, 1)
          hint = f"; did you mean {near[0]!r}?" if near else "; add rows with it."
          raise LoraxError(
            f"{label.place}: no row to train on has the class {name!r}, which is in "
            f"{split} alone{hint} There are: {listing(names)}"
          )
