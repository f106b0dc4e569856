"""E2E (arXiv 1706.09254): meaning representations, and texts that people wrote.

Texts are as the LoRA paper's own code has them (examples/NLG of
github.com/microsoft/LoRA): "name[Blue Spice], eatType[pub]" is "name : Blue Spice |
Type : pub", and marks of punctuation are words.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax_flax.data import tfds as tfds_data
from lorax_flax.data.own import table
from lorax_flax.errors import LoraxError, listing

# Names of a split's file: the published ones, and those without "set".
FILES = {
  "train": ("trainset.csv", "train.csv"),
  "validation": ("devset.csv", "dev.csv"),
  "test": ("testset_w_refs.csv", "test.csv"),
}
SPLITS = tuple(FILES)
_TFDS = "e2e_cleaned"
_ADVICE = (
  f"Run `tfds build {_TFDS} --file_format={tfds_data.FORMAT}` on a machine with "
  "network and TensorFlow, and name the folder that it is in (data.tfds_dir); or give "
  "the folder of E2E's CSV files (data.path)"
)
# Attributes that the paper's code calls otherwise.
_NAMES = {
  "eatType": "Type",
  "priceRange": "price",
  "familyFriendly": "family friendly",
}
_ATTRIBUTE = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")
# An apostrophe within a word goes with what follows it: "it 's".
_MARK = re.compile(r"([^\w\s']|(?<!\w)'|'(?!\w))")


class Pair(NamedTuple):
  """A row: where it is, the prompt, and a reference for it."""

  place: str
  prompt: str
  reference: str


class Group(NamedTuple):
  """A meaning representation: its prompt, and all references for it."""

  prompt: str
  references: list[str]


def read(split: str, *, path: str | None, tfds_dir: str | None) -> list[Pair]:
  """The rows of a split.

  Args:
    split: one of `SPLITS`.
    path: a folder with E2E's CSV files, of the columns mr and ref.
    tfds_dir: in place of it, a folder of prepared TFDS data: of e2e_cleaned, the only
      E2E that it has.

  Raises:
    LoraxError: neither or both; no such file or data; a row that can't be used, named.
  """
  if (path is None) == (tfds_dir is None):
    raise LoraxError(
      "E2E: give the folder of its CSV files (data.path) or TFDS's (data.tfds_dir)"
    )
  if path is None:
    return _of_tfds(split, tfds_dir)
  file = _file(Path(path).expanduser(), split)
  found = table.read(file)
  if absent := [name for name in ("mr", "ref") if name not in found.columns]:
    raise LoraxError(
      f"{file} has no column {absent[0]!r}; there are: {listing(found.columns)}"
    )
  pairs = []
  for row in found.rows:
    mr, reference = (table.text(found, row, name) for name in ("mr", "ref"))
    try:
      prompt = linearized(_attributes(mr))
    except LoraxError as error:
      raise LoraxError(f"{file}: {row.place}: {error}") from error
    pairs.append(Pair(f"{file}: {row.place}", prompt, in_words(reference)))
  return pairs


def grouped(pairs: Sequence[Pair]) -> list[Group]:
  """The references of each prompt, in the order of its first."""
  found: dict[str, list[str]] = {}
  for pair in pairs:
    found.setdefault(pair.prompt, []).append(pair.reference)
  return [Group(prompt, references) for prompt, references in found.items()]


def spread(rows: Sequence[Any], most: int | None) -> list[Any]:
  """Rows, at most so many and evenly spread over all; None takes all."""
  count = len(rows) if most is None else min(most, len(rows))
  return [rows[i * len(rows) // count] for i in range(count)]


def linearized(attributes: Mapping[str, str]) -> str:
  """A meaning representation as a text, "name : Blue Spice | Type : pub"."""
  return " | ".join(
    f"{_NAMES.get(name, name)} : {in_words(value)}"
    for name, value in attributes.items()
  )


def in_words(text: str) -> str:
  """A text whose marks of punctuation stand alone, "family - friendly"."""
  return " ".join(_MARK.sub(r" \1 ", text).replace("'", " '").split())


def _attributes(mr: str) -> dict[str, str]:
  found: dict[str, str] = {}
  place = 0
  while place < len(mr):
    match = _ATTRIBUTE.match(mr, place)
    if match is None:
      raise LoraxError(
        "its mr is no list of attributes, name[Blue Spice], area[riverside]: "
        f"{mr!r:.80}"
      )
    found[match[1].strip()] = match[2]
    place = match.end()
  return found


def _file(folder: Path, split: str) -> Path:
  for name in FILES[split]:
    if (folder / name).is_file():
      return folder / name
  there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
  raise LoraxError(
    f"{folder} has no {FILES[split][0]}; there is: {listing(there) or 'nothing'}"
  )


def _of_tfds(split: str, tfds_dir: str | None) -> list[Pair]:
  made = builder(tfds_dir)
  if not tfds_data.is_prepared(made):
    raise LoraxError(f"{_TFDS} isn't prepared in {made.data_path}. {_ADVICE}")
  read_split = _rows(str(tfds_dir))
  pairs = []
  for number, row in enumerate(read_split(split), 1):
    cells = row["input_text"]["table"]
    names, values = (
      [cell.decode("utf-8") for cell in cells[column]]
      for column in ("column_header", "content")
    )
    prompt = linearized(dict(zip(names, values, strict=True)))
    reference = in_words(row["target_text"].decode("utf-8"))
    pairs.append(Pair(f"{_TFDS}: row {number} of {split}", prompt, reference))
  return pairs


@functools.cache
def _rows(tfds_dir: str) -> Any:
  return tfds_data.rows(builder(tfds_dir), _TFDS, _ADVICE)


def builder(data_dir: str | Path | None) -> Any:
  """TFDS's builder of e2e_cleaned."""

  def find(tfds: Any) -> Any:
    del tfds
    from tensorflow_datasets.datasets.e2e_cleaned import e2e_cleaned_dataset_builder

    return e2e_cleaned_dataset_builder.Builder(data_dir=tfds_data.root(data_dir))

  return tfds_data.builder(find)
