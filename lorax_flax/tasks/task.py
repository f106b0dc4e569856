"""The description of a task, and the table of them.

A new task is one file and one row of `TASKS`; a user's own file registers its row with
`TASKS["name"] = Task(…)` before the settings that name it are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorax_flax.data.config import DataSettings
from lorax_flax.data.examples import Splits
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.train.objective import Objective

if TYPE_CHECKING:  # --help and mistakes in flags need not wait for these.
  from lorax_flax.data.pipeline import Rows
  from lorax_flax.models.family import Task as ModelTask
  from lorax_flax.models.registry import Loaded, Located, Outline
  from lorax_flax.train.samples import Samples


@dataclass(frozen=True)
class Task:
  """A task: what is learnt, from which rows, and how it is judged.

  Attributes:
    name: the name in messages and titles.
    model: kind of model that it trains; see `lorax_flax.models.family.Family.task`.
    num_labels: width of the head; None where that is the model's own.
    labels: names of the outputs; None where they are not classes.
    settings: the frozen dataclass of what the task reads, `DataSettings` or one made
      from it. Its fields are `data.NAME` in configs and flags, its docstring's section
      `Attributes:` their help; another field that is set is an error.
    read: (settings, model) -> rows.
    blank: (model, length) -> one row of that many tokens, for its shapes.
    objective: (label smoothing) -> loss, metrics and unit of throughput.
    problem_type: transformers' name of the problem, where the number of labels does not
      say it.
    describe: (settings, model) -> lines that show what was found in the user's data,
      with examples as the model sees them; None where the rows are always the same.
    samples: (settings, model, rows) -> prompts that are answered at each evaluation, or
      None; None where a model of this task writes nothing.
  """

  name: str
  model: ModelTask
  num_labels: int | None
  labels: Sequence[str] | None
  settings: type[DataSettings]
  read: Callable[[Any, Located], Splits[Rows]]
  blank: Callable[[Outline, int], Rows]
  objective: Callable[[float], Objective]
  problem_type: str | None = None
  describe: Callable[[Any, Located], list[str]] | None = None
  samples: Callable[[Any, Loaded, Splits[Rows]], Samples | None] | None = None

  def __post_init__(self):
    _check_settings(self.name, self.settings)

  def open(self, settings: Any) -> Task:
    """The task itself: nothing of it follows from the settings."""
    del settings
    return self


@dataclass(frozen=True)
class OwnTask:
  """A row of the table whose labels, loss and metrics follow from the user's data.

  Attributes:
    name: as of `Task`.
    settings: as of `Task`.
    open: (settings) -> the task; reads the data, once for all that the task does.
  """

  name: str
  settings: type[DataSettings]
  open: Callable[[Any], Task]

  def __post_init__(self):
    _check_settings(self.name, self.settings)


def _check_settings(name: str, own: type[DataSettings]) -> None:
  # Of a subclass that is no dataclass of its own, the new fields would be lost.
  if not issubclass(own, DataSettings) or "__dataclass_fields__" not in vars(own):
    raise LoraxError(
      f"the task {name}: its settings {own.__name__} are no frozen dataclass made from "
      "DataSettings"
    )


# By the name in `data.task`.
TASKS: dict[str, Task | OwnTask] = {}


def get(name: str) -> Task | OwnTask:
  """The row of that name; raises LoraxError where there is none."""
  check_known("task", name, TASKS)
  return TASKS[name]


def opened(settings: DataSettings) -> Task:
  """The task that the settings name, its data read where its labels are there.

  Raises:
    LoraxError: what `of` raises, and what reading raises.
  """
  return of(settings).open(settings)


def of(settings: DataSettings) -> Task | OwnTask:
  """The row that the settings name.

  Raises:
    LoraxError: there is none of that name, or it reads settings of another type.
  """
  task = get(settings.task)
  # By name, since a user's file that defines them may be run more than once.
  names = {(x.__module__, x.__qualname__) for x in (type(settings), task.settings)}
  if len(names) > 1:
    raise LoraxError(
      f"the task {settings.task} reads {task.settings.__name__}, and data is "
      f"{type(settings).__name__}"
    )
  return task
