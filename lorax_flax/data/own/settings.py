"""Settings of a user's own files, which every task that reads them has."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorax_flax.data.config import DataSettings
from lorax_flax.errors import LoraxError, check_known


@dataclass(frozen=True)
class OwnSettings(DataSettings):
  """Settings of a user's own files.

  Attributes:
    path: a file, or a folder with train.* and validation.* (or test.*): .jsonl, .json,
      .csv, .tsv or .parquet.
    columns: the file's own name of a column, where it has another, as in
      data.columns.text=body.
    held_out: share of a single file's rows that are held out to evaluate.
    bad_rows: "error" for a row that can't be used, or "skip", which counts them.
  """

  path: str | None = None
  columns: Mapping[str, str] = field(default_factory=dict)
  held_out: float = 0.1
  bad_rows: str = "error"

  def __post_init__(self):
    super().__post_init__()
    check_known("data.bad_rows", self.bad_rows, ("error", "skip"))
    if not 0 < self.held_out < 1:
      raise LoraxError(f"data.held_out is a share above 0, below 1: {self.held_out}")

  @property
  def skips(self) -> bool:
    """True where rows that can't be used are skipped."""
    return self.bad_rows == "skip"

  def required_path(self, question: str) -> str:
    """The path; where there is none, LoraxError asks the question."""
    if self.path is None:
      raise LoraxError(f"data.path: {question}")
    return self.path
