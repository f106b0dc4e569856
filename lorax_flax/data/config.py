"""Settings that every task reads; a task's own are a subclass beside it."""

from dataclasses import dataclass

from lorax_flax.errors import LoraxError


@dataclass(frozen=True)
class DataSettings:
  """Choice of examples, and how they become batches.

  Attributes:
    task: a key of `lorax_flax.tasks.task.TASKS`: headlines, GLUE's, next_token, …
    max_length: number of tokens that an example is truncated to.
    buckets: largest number of padded lengths; each is compiled.
  """

  task: str
  max_length: int = 128
  buckets: int = 4

  def __post_init__(self):
    for name in ("max_length", "buckets"):
      if getattr(self, name) < 1:
        raise LoraxError(f"data.{name} must be at least 1, not {getattr(self, name)}")
