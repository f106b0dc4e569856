"""The splits of a user's data: files of their own, or shares of one file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lorax_flax.data.own.table import FORMATS, Row, Table, read
from lorax_flax.errors import LoraxError, listing

TRAIN = "train"
# Names of a file that holds a split to evaluate, and the split's own.
EVALUATION = {
  "dev": "validation",
  "eval": "validation",
  "test": "test",
  "val": "validation",
  "valid": "validation",
  "validation": "validation",
}


def read_splits(
  path: str, held_out: float, *, skip: bool = False
) -> Mapping[str, Table]:
  """Tables by the split's name, "train" first.

  Args:
    path: a file, of which a share is held out as "validation", or a folder with
      train.* and at least one of validation.* and test.*.
    held_out: that share, in (0, 1). A row goes by a hash of its values: rows that are
      the same are in the same split, and another row changes no other's.
    skip: as of `table.read`.

  Raises:
    LoraxError: no such file or folder; files that are missing or there twice; a share
      that leaves a split empty.
  """
  source = Path(path).expanduser()
  if source.is_dir():
    return _of_folder(source, skip)
  return hold_out(read(source, skip=skip), held_out)


def hold_out(table: Table, held_out: float) -> Mapping[str, Table]:
  """The two splits of one table; arguments and errors as of `read_splits`."""
  rows: dict[bool, list[Row]] = {True: [], False: []}
  for row in table.rows:
    rows[_place(row) < held_out].append(row)
  for is_held_out, name in ((False, TRAIN), (True, "validation")):
    if not rows[is_held_out]:
      raise LoraxError(
        f"{table.file}: of its {len(table):,} rows none is left for {name}; give "
        "data.held_out another share, or a folder with train and validation files"
      )
  return {
    TRAIN: replace(table, rows=rows[False]),
    "validation": replace(table, rows=rows[True], bad=()),
  }


def _of_folder(folder: Path, skip: bool) -> Mapping[str, Table]:
  found: dict[str, Path] = {}
  for file in sorted(folder.iterdir()):
    name = {TRAIN: TRAIN, **EVALUATION}.get(file.stem.lower())
    if name is None or file.suffix.lower() not in FORMATS:
      continue
    if name in found:
      raise LoraxError(f"{folder}: both {found[name].name} and {file.name} are {name}")
    found[name] = file
  missing = [TRAIN] if TRAIN not in found else []
  missing += [] if len(found) > 1 or missing else ["validation or test"]
  if missing:
    there = listing([file.name for file in sorted(folder.iterdir())]) or "nothing"
    raise LoraxError(
      f"{folder} has no {missing[0]} file of {', '.join(FORMATS)}; there is: {there}"
    )
  order = [TRAIN, *(name for name in found if name != TRAIN)]
  return {name: read(found[name], skip=skip) for name in order}


def _place(row: Row) -> float:
  """A number in [0, 1), by the row's values alone."""
  text = json.dumps(row.values, sort_keys=True, default=str)
  digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:8], "big") / 2**64
