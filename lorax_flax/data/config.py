"""Settings of the examples and how they become batches."""

from dataclasses import dataclass

from lorax_flax.errors import LoraxError


@dataclass(frozen=True)
class DataSettings:
  """Choice of examples, and how they become batches.

  Attributes:
    task: a key of `lorax_flax.tasks.task.TASKS`: headlines, GLUE's, next_token, …
    path: for next_token, a folder with train.jsonl and validation.jsonl, whose lines
      `lorax_flax.data.sequences` reads.
    max_length: number of tokens that an example is truncated to.
    buckets: largest number of padded lengths; each is compiled.
    glue_dir: a folder of GLUE's TSVs; None takes TFDS's data.
    tfds_dir: where TFDS keeps data; None is its own choice.
  """

  task: str
  path: str | None = None
  max_length: int = 128
  buckets: int = 4
  glue_dir: str | None = None
  tfds_dir: str | None = None

  def __post_init__(self):
    for name in ("max_length", "buckets"):
      if getattr(self, name) < 1:
        raise LoraxError(f"data.{name} must be at least 1, not {getattr(self, name)}")
    if self.glue_dir is not None and self.tfds_dir is not None:
      raise LoraxError("give data.glue_dir or data.tfds_dir, not both")
