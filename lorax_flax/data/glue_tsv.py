"""The TSV files of the public GLUE archive."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_flax.data.tasks import Task
from lorax_flax.errors import LoraxError, listing, unknown


@dataclass(frozen=True)
class Layout:
  """The files and columns of one task.

  Attributes:
    folder: in the archive.
    text: the columns of the texts, in the task's order.
    label: the column of the label.
    columns: of a file without a header.
    files: split -> file.
    broken: the share of rows that may have a wrong number of columns. These are
      skipped, as by TFDS and the GLUE baselines.
  """

  folder: str
  text: tuple[str, ...]
  label: str
  columns: tuple[str, ...] = ()
  files: Mapping[str, str] | None = None
  broken: float = 0.0

  def file(self, split: str) -> str:
    return (self.files or _FILES)[split]


_FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
_MNLI_FILES = {
  "train": "train.tsv",
  "validation_matched": "dev_matched.tsv",
  "validation_mismatched": "dev_mismatched.tsv",
  "test_matched": "test_matched.tsv",
  "test_mismatched": "test_mismatched.tsv",
}
_PAIR = ("sentence1", "sentence2")

LAYOUTS: Mapping[str, Layout] = {
  "mnli": Layout("MNLI", _PAIR, "gold_label", files=_MNLI_FILES),
  "sst2": Layout("SST-2", ("sentence",), "label"),
  "mrpc": Layout("MRPC", ("#1 String", "#2 String"), "Quality"),
  "cola": Layout(
    "CoLA",
    ("sentence",),
    "is_acceptable",
    columns=("source", "is_acceptable", "mark", "sentence"),
  ),
  "qnli": Layout("QNLI", ("question", "sentence"), "label"),
  # Some questions have a line break in them, which leaves two short rows: about 20 of
  # 364,000 in the archive.
  "qqp": Layout("QQP", ("question1", "question2"), "is_duplicate", broken=1e-3),
  "rte": Layout("RTE", _PAIR, "label"),
  "stsb": Layout("STS-B", _PAIR, "score"),
}


def files(task: Task, glue_dir: str | Path) -> dict[str, Path]:
  """The task's files, by split. Only those of the test splits may be missing.

  Raises:
    LoraxError: no such folder, no folder of the task in it, or a missing file.
  """
  root, layout = Path(glue_dir).expanduser(), LAYOUTS[task.name]
  if not root.is_dir():
    raise LoraxError(
      f"no folder {root}: --config.data.glue_dir has a sub-folder for each GLUE task"
    )
  folder = root / layout.folder
  if not folder.is_dir():
    there = [entry.name for entry in root.iterdir() if entry.is_dir()]
    raise LoraxError(
      f"no folder {layout.folder} in {root}, which task {task.name} is read from. "
      f"There are: {listing(there) or 'none'}"
    )
  found = {
    split: folder / name
    for split, name in (layout.files or _FILES).items()
    if split in task.splits or (folder / name).is_file()
  }
  for file in found.values():
    if not file.is_file():
      there = [entry.name for entry in folder.iterdir()]
      raise LoraxError(
        f"no file {file}, which task {task.name} needs. "
        f"There are: {listing(there) or 'none'}"
      )
  return found


def read(task: Task, split: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Reads rows in TFDS's form: (row number, {text columns…, "label", "idx"}).

  There is no quoting: a quotation mark is an ordinary character.

  Args:
    task: the task.
    split: of it; the test splits have no labels, and get -1.
    file: of `files`.

  Yields:
    The row's number in the file, from 0, and its features.

  Raises:
    LoraxError: a missing column, a wrong number of columns, an unknown label, text that
      isn't UTF-8, or no rows; it names the file and the line.
  """
  layout = LAYOUTS[task.name]
  labelled = split in task.splits
  lines = _lines(file)
  columns = layout.columns if labelled else ()
  first = 1
  if not columns:
    header = next(lines, "")
    columns, first = tuple(header.split("\t")), 2
  for name in (*layout.text, *([layout.label] if labelled else [])):
    if name not in columns:
      raise LoraxError(f"{file}:1: {unknown('column', name, columns)}")
  texts = [columns.index(name) for name in layout.text]
  label = columns.index(layout.label) if labelled else None
  broken: list[int] = []
  number = -1
  for number, line in enumerate(lines):
    cells = line.split("\t")
    if len(cells) != len(columns):
      broken.append(number + first)
      if not layout.broken:
        break
      continue
    row: dict[str, Any] = {
      name: cells[at] for name, at in zip(task.text, texts, strict=True)
    }
    where = f"{file}:{number + first}"
    row["label"] = -1 if label is None else _label(task, cells[label], where)
    row["idx"] = number
    yield number, row
  if number < 0:
    raise LoraxError(f"{file} has no rows")
  if len(broken) > layout.broken * number:
    raise LoraxError(
      f"{file}:{broken[0]}: a row of {task.name} has {len(columns)} columns, separated "
      f"by tabs, and this one has another number ({len(broken)} such rows so far)"
    )


def _lines(file: Path) -> Iterator[str]:
  """Lines, less those that are blank at the end."""
  # Only "\n" ends a line: str.splitlines and universal newlines would split texts at
  # other characters too.
  number = blank = 0
  try:
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
      for raw in stream:
        number += 1
        line = raw.removesuffix("\n").removesuffix("\r")
        if not line:
          blank += 1
          continue
        yield from [""] * blank
        blank = 0
        yield line
  except UnicodeDecodeError as error:
    raise LoraxError(f"{file}, after line {number}: not UTF-8: {error}") from error


def _label(task: Task, value: str, where: str) -> int | float:
  """The class's number, given as a name or as a number; or the score."""
  if task.regression:
    try:
      score = float(value)
    except ValueError:
      score = float("nan")
    # GLUE's one regression task, STS-B, has scores from 0 to 5; NaN fails too.
    if not 0 <= score <= 5:
      raise LoraxError(f"{where}: the score is a number from 0 to 5, not {value!r}")
    return score
  if value in task.labels:
    return task.labels.index(value)
  if value.isascii() and value.isdigit() and int(value) < len(task.labels):
    return int(value)
  numbers = [str(n) for n in range(len(task.labels))]
  raise LoraxError(f"{where}: {unknown('label', value, [*task.labels, *numbers])}")
