"""Settings of a language model's own data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lorax_flax.data.config import DataSettings
from lorax_flax.errors import LoraxError, check_known


@dataclass(frozen=True)
class TextSettings(DataSettings):
  """Settings of a language model's own data.

  Columns of its files: messages (chats); prompt and completion; text (documents); or
  input_ids and, where not all are learnt, loss_mask.

  Attributes:
    path: a file, or a folder with train.* and validation.* (or test.*): .jsonl, .json,
      .csv, .tsv or .parquet.
    columns: the file's own name of a column, where it has another, as in
      data.columns.text=body.
    held_out: share of a single file's rows that are held out to evaluate.
    bad_rows: "error" for a row that can't be used, or "skip", which counts them.
    documents: "windows" cuts texts one after another into rows of max_length tokens;
      "rows" has one row for each text.
    chat_template: a .jinja file in place of the model's own template.
    learn: "all" assistant turns of a chat, or the "last".
    packing: puts several rows to train on into one of up to max_length tokens; each
      attends to itself alone.
  """

  path: str | None = None
  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
  held_out: float = 0.1
  bad_rows: str = "error"
  documents: str = "windows"
  chat_template: str | None = None
  learn: str = "all"
  packing: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, known in _CHOICES.items():
      check_known(f"data.{name}", getattr(self, name), known)
    if not 0 < self.held_out < 1:
      raise LoraxError(f"data.held_out is a share above 0, below 1: {self.held_out}")


_CHOICES = {
  "bad_rows": ("error", "skip"),
  "documents": ("windows", "rows"),
  "learn": ("all", "last"),
}
