"""Regression of a number from texts, or from pairs of them."""

from lorax_flax.data.tasks import Task as Dataset
from lorax_flax.errors import LoraxError
from lorax_flax.tasks.classification import of_texts
from lorax_flax.tasks.task import Task
from lorax_flax.train import losses
from lorax_flax.train.losses import Loss


def task(dataset: Dataset) -> Task:
  """The task of a dataset whose labels are numbers."""

  def loss(label_smoothing: float) -> Loss:
    if label_smoothing:
      raise LoraxError(
        f"train.label_smoothing means nothing for {dataset.name}: no classes"
      )
    return losses.squared_error

  return of_texts(dataset, ("score",), loss)
