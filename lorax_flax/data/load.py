"""The front door: a task's examples by name."""

from pathlib import Path

from lorax_flax.data import glue, headlines, tasks
from lorax_flax.data.examples import Splits
from lorax_flax.errors import LoraxError


def load(
  name: str, *, glue_dir: str | Path | None = None, tfds_dir: str | Path | None = None
) -> Splits:
  """Reads a task's training and evaluation splits.

  Args:
    name: a key of `tasks.TASKS`.
    glue_dir, tfds_dir: where GLUE is, as in `glue.load`; of no use to other tasks.

  Returns:
    Splits; the evaluation splits are those of `tasks.get(name).evaluation`.

  Raises:
    LoraxError: an unknown task, data that is missing or malformed, or a folder of GLUE
      given for a task that isn't GLUE's.
  """
  task = tasks.get(name)
  if task.source == "glue":
    return glue.load(task, glue_dir=glue_dir, tfds_dir=tfds_dir)
  if glue_dir is not None or tfds_dir is not None:
    raise LoraxError(f"task {name} is no GLUE task: it has no use for a GLUE folder")
  return headlines.load()
