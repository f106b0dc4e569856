"""The description of a task, and the table of them.

A new task is one file and one row of `TASKS`; a user's own file registers its row with
`TASKS["name"] = Task(…)` before the settings that name it are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lorax_flax.data.config import DataSettings
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.train.objective import Objective

if TYPE_CHECKING:  # --help and mistakes in flags need not wait for these.
  from lorax_flax.data.pipeline import Rows
  from lorax_flax.models.family import Task as ModelTask
  from lorax_flax.models.registry import Loaded, Outline


class Splits(NamedTuple):
  """Rows to train on, and to evaluate by the split's name."""

  train: Rows
  evaluation: Mapping[str, Rows]


@dataclass(frozen=True)
class Task:
  """A task: what is learnt, from which rows, and how it is judged.

  Attributes:
    name: the name in messages and titles.
    model: kind of model that it trains; see `lorax_flax.models.family.Family.task`.
    num_labels: width of the head; None where that is the model's own.
    labels: names of the outputs; None where they are not classes.
    settings: the fields of `DataSettings` that this task reads besides `task`,
      `max_length` and `buckets`; another that is set is an error.
    read: (settings, model) -> rows.
    blank: (model, length) -> one row of that many tokens, for its shapes.
    objective: (label smoothing) -> loss, metrics and unit of throughput.
  """

  name: str
  model: ModelTask
  num_labels: int | None
  labels: Sequence[str] | None
  settings: Sequence[str]
  read: Callable[[DataSettings, Loaded], Splits]
  blank: Callable[[Outline, int], Rows]
  objective: Callable[[float], Objective]


# By the name in `data.task`.
TASKS: dict[str, Task] = {}

_OPTIONAL = ("path", "glue_dir", "tfds_dir")


def of(settings: DataSettings) -> Task:
  """The task that the settings name.

  Raises:
    LoraxError: there is none of that name, or it does not read a field that is set.
  """
  if settings.task not in TASKS:
    raise LoraxError(unknown("task", settings.task, TASKS))
  task = TASKS[settings.task]
  for name in _OPTIONAL:
    if getattr(settings, name) is not None and name not in task.settings:
      raise LoraxError(f"data.{name} is of no use to the task {settings.task}")
  return task
