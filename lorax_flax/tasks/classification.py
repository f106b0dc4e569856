"""Classification of texts, or of pairs of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorax_flax.data import load as data
from lorax_flax.data.config import DataSettings
from lorax_flax.data.tasks import Task as Dataset
from lorax_flax.data.tokenize import load_tokenizer, tokenize
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.errors import LoraxError
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train import losses
from lorax_flax.train.losses import Loss
from lorax_flax.train.objective import TOKENS, Objective
from lorax_flax.train.report import of_classes

if TYPE_CHECKING:
  from lorax_flax.models.registry import Located, Outline


@dataclass(frozen=True)
class GlueSettings(DataSettings):
  """Settings of GLUE's data.

  Attributes:
    glue_dir: a folder of GLUE's TSVs; None takes TFDS's data.
    tfds_dir: where TFDS keeps data; None is its own choice.
  """

  glue_dir: str | None = None
  tfds_dir: str | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.glue_dir is not None and self.tfds_dir is not None:
      raise LoraxError("give data.glue_dir or data.tfds_dir, not both")


def task(dataset: Dataset) -> Task:
  """The task of a dataset with classes."""
  return of_texts(dataset, dataset.labels, losses.cross_entropy)


def of_texts(
  dataset: Dataset, labels: tuple[str, ...], loss: Callable[[float], Loss]
) -> Task:
  """The task of a dataset of texts.

  Args:
    labels: names of the outputs.
    loss: (label smoothing) -> loss.
  """

  def objective(label_smoothing: float) -> Objective:
    return Objective(
      loss(label_smoothing),
      dataset.metrics,
      dataset.primary,
      throughput=TOKENS,
      report=of_classes(labels) if dataset.labels else None,
    )

  return Task(
    name=dataset.name,
    model="sequence-classification",
    num_labels=len(labels),
    labels=labels,
    settings=GlueSettings if dataset.source == "glue" else DataSettings,
    read=functools.partial(_read, dataset),
    blank=functools.partial(
      blank, label=np.float32 if dataset.regression else np.int32
    ),
    objective=objective,
  )


def _read(dataset: Dataset, settings: DataSettings, model: Located) -> Splits:
  folders = {}
  if isinstance(settings, GlueSettings):
    folders = {"glue_dir": settings.glue_dir, "tfds_dir": settings.tfds_dir}
  splits = data.load(dataset.name, **folders)
  tokenizer = load_tokenizer(model.folder)
  rows = {
    name: tokenize(
      examples,
      tokenizer,
      max_length=settings.max_length,
      token_types=model.token_types,
      regression=dataset.regression,
    )
    for name, examples in {"train": splits.train, **splits.evaluation}.items()
  }
  return Splits(rows.pop("train"), rows)


def blank(model: Outline, length: int, label: type = np.int32) -> Tokens:
  """One row of `length` tokens, for its shapes, with a label of that dtype."""
  ids_S, offsets = ragged([np.zeros(length, np.int32)])
  return Tokens(
    ids_S,
    offsets,
    pad_id=0,
    token_type_ids_S=ids_S if model.token_types else None,
    labels_N=np.zeros(1, label),
  )
