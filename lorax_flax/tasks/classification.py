"""Texts, or pairs of them, and their classes or numbers."""

import numpy as np

from lorax_flax.data import load as data
from lorax_flax.data import tasks
from lorax_flax.data.tasks import Task
from lorax_flax.data.tokenize import load_tokenizer, tokenize
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.settings import DataSettings, Settings
from lorax_flax.models.registry import Loaded, Outline
from lorax_flax.tasks.task import Kind, Splits
from lorax_flax.train import losses
from lorax_flax.train import step as steps
from lorax_flax.train.losses import Loss


def kind(wanted: Settings) -> Kind:
  """What a task of `lorax_flax.data.tasks` brings.

  Raises:
    LoraxError: label smoothing of a regression.
  """
  task = tasks.get(wanted.data.task)
  loss = _loss(task, wanted.train.label_smoothing)
  return Kind(
    name=task.name,
    model="sequence-classification",
    num_labels=task.num_labels,
    labels=task.labels or ("score",),
    read=lambda loaded, say: _read(wanted.data, task, loaded),
    blank=lambda model, length: _blank(task, model, length),
    loss=loss,
    eval_loss=loss,
    predictions=steps.logits,
    metrics=task.metrics,
    primary=task.primary,
  )


def _loss(task: Task, label_smoothing: float) -> Loss:
  if not task.regression:
    return losses.cross_entropy(label_smoothing)
  if label_smoothing:
    raise LoraxError(f"train.label_smoothing means nothing for {task.name}: no classes")
  return losses.squared_error


def _read(wanted: DataSettings, task: Task, loaded: Loaded) -> Splits:
  splits = data.load(task.name, glue_dir=wanted.glue_dir, tfds_dir=wanted.tfds_dir)
  tokenizer = load_tokenizer(loaded.folder)
  rows = {
    name: tokenize(
      examples,
      tokenizer,
      max_length=wanted.max_length,
      token_types=loaded.token_types,
      regression=task.regression,
    )
    for name, examples in {"train": splits.train, **splits.evaluation}.items()
  }
  return Splits(rows.pop("train"), rows)


def _blank(task: Task, model: Outline, length: int) -> Tokens:
  ids_S, offsets = ragged([np.zeros(length, np.int32)])
  return Tokens(
    ids_S,
    offsets,
    pad_id=0,
    token_type_ids_S=ids_S if model.token_types else None,
    labels_N=np.zeros(1, np.float32 if task.regression else np.int32),
  )
