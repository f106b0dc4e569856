"""The examples of a task, by its name."""

from pathlib import Path

from lorax_flax.data import glue, headlines, tasks
from lorax_flax.data.examples import Examples
from lorax_flax.errors import LoraxError


def load(
  name: str, *, glue_dir: str | Path | None = None, tfds_dir: str | Path | None = None
) -> Examples:
  """Reads a task's training and evaluation splits.

  Args:
    name: a key of `tasks.TASKS`.
    glue_dir, tfds_dir: folders of GLUE, see `glue.load`; an error for other tasks.

  Returns:
    Splits; the evaluation splits are those of `tasks.get(name).evaluation`.

  Raises:
    LoraxError: an unknown task, missing or malformed data, or a folder of GLUE for
      another task.
  """
  task = tasks.get(name)
  if task.source == "glue":
    return glue.load(task, glue_dir=glue_dir, tfds_dir=tfds_dir)
  if glue_dir is not None or tfds_dir is not None:
    raise LoraxError(f"task {name} is not a GLUE task, and takes no GLUE folder")
  return headlines.load()
