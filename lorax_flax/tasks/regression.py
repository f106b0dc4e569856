"""Regression of a number from texts, or from pairs of them."""

from collections.abc import Callable

from lorax_flax.data.tasks import Task as Dataset
from lorax_flax.errors import LoraxError
from lorax_flax.tasks.classification import of_texts
from lorax_flax.tasks.task import Task
from lorax_flax.train import losses
from lorax_flax.train.losses import Loss


def task(dataset: Dataset) -> Task:
  """The task of a dataset whose labels are numbers."""
  return of_texts(dataset, ("score",), unsmoothed(dataset.name, losses.squared_error))


def unsmoothed(task: str, loss: Loss) -> Callable[[float], Loss]:
  """(label smoothing) -> the loss of a task to which smoothing means nothing."""

  def checked(label_smoothing: float) -> Loss:
    if label_smoothing:
      raise LoraxError(
        f"train.label_smoothing means nothing for {task}: its labels are no single "
        "class"
      )
    return loss

  return checked
