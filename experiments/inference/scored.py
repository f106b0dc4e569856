"""Generated texts and their references, as files hold them, and the table of scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorax_flax import text_table
from lorax_flax.data.own import table
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.files import strict_json, workdir

_TEXT = "text"


def references(file: Path) -> list[list[str]]:
  """Groups of references of a file.

  Args:
    file: .txt, a reference on each line and a blank line between groups, or each its
      own group where there are none; or .csv or .tsv of the columns mr and ref, where
      rows of one mr are a group.

  Raises:
    LoraxError: no such file, another ending, or a row that can't be used.
  """
  if file.suffix == ".txt":
    blocks = "\n".join(_lines(file)).strip("\n").split("\n\n")
    groups = [[x for x in block.split("\n") if x] for block in blocks]
    return groups if len(groups) > 1 else [[text] for text in groups[0]]
  if file.suffix not in (".csv", ".tsv"):
    raise LoraxError(
      f"{file}: {unknown('ending', file.suffix, ('.txt', '.csv', '.tsv'))}"
    )
  found = table.read(file)
  if absent := {"mr", "ref"} - set(found.columns):
    raise LoraxError(f"{file} has no column {min(absent)!r}")
  groups_of: dict[str, list[str]] = {}
  for row in found.rows:
    mr, text = (table.text(found, row, name) for name in ("mr", "ref"))
    groups_of.setdefault(mr, []).append(text)
  return list(groups_of.values())


def outputs(file: Path) -> list[str]:
  """Texts of a file: .jsonl of `experiments.generate`, or .txt, a text on each line.

  A text ends before a blank line, as in the LoRA paper's code.

  Raises:
    LoraxError: no such file, another ending, or a line without a text.
  """
  if file.suffix == ".txt":
    return _lines(file)
  if file.suffix != ".jsonl":
    raise LoraxError(f"{file}: {unknown('ending', file.suffix, ('.jsonl', '.txt'))}")
  texts = []
  for number, line in strict_json.lines(file):
    if not isinstance(line.get(_TEXT), str):
      raise LoraxError(f"{file}: line {number} has no {_TEXT!r}")
    texts.append(" ".join(line[_TEXT].strip().split("\n\n")[0].split()))
  return texts


def write_references(file: Path, groups: Sequence[Sequence[str]]) -> None:
  """Writes groups as a .txt that `references` reads."""
  workdir.write_text(file, "\n\n".join("\n".join(own) for own in groups) + "\n")


def shown(scores: Mapping[str, float | None]) -> str:
  """A table of scores; BLEU, METEOR and ROUGE-L in hundredths, as papers have them."""
  rows = []
  for name, score in scores.items():
    factor = 100 if name in ("BLEU", "METEOR", "ROUGE-L") else 1
    rows.append((name, "needs Java" if score is None else f"{factor * score:.2f}"))
  return text_table.render(("metric", "score"), rows, align="lr")


def _lines(file: Path) -> list[str]:
  if not file.is_file():
    raise LoraxError(f"no file {file}")
  text = file.read_text("utf-8-sig")
  return [line.strip() for line in text.removesuffix("\n").split("\n")]
