"""The task: next-token prediction, scored by perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorax_flax.data import packing, sequences
from lorax_flax.data.own.splits import TRAIN
from lorax_flax.data.sequences import Sequences
from lorax_flax.tasks import answers, perplexity
from lorax_flax.tasks.causal_lm.settings import TextSettings
from lorax_flax.tasks.task import OwnTask, Splits, Task
from lorax_flax.train import objective
from lorax_flax.train.token_scores import next_labels

if TYPE_CHECKING:
  from lorax_flax.models.registry import Located, Outline
  from lorax_flax.tasks.causal_lm.read import Found

_NAME = "next_token"


def _open(settings: TextSettings) -> Task:
  """The task of the settings' files, read once the model's tokenizer is known."""
  # Here, since --help and mistakes in flags need not wait for them.
  from lorax_flax.tasks.causal_lm.description import describe
  from lorax_flax.tasks.causal_lm.read import read

  # They are read to be trained on, and again to be described.
  read_once: dict[Path, tuple[Found, Sequences]] = {}

  def data(model: Located) -> tuple[Found, Sequences]:
    if model.folder not in read_once:
      found = read(settings, model)
      rows = found.rows[TRAIN].rows
      # Packs are trained on alone: evaluations count examples.
      trained = packing.pack(rows, settings.max_length) if settings.packing else rows
      read_once[model.folder] = (found, trained)
    return read_once[model.folder]

  def blank(_: Outline, length: int) -> Sequences:
    row = sequences.blank(length)
    return packing.pack(row, length) if settings.packing else row

  def splits(_: TextSettings, model: Located) -> Splits:
    found, trained = data(model)
    held_out = {name: each.rows for name, each in found.rows.items() if name != TRAIN}
    return Splits(trained, held_out)

  return Task(
    name=_NAME,
    model="causal-lm",
    num_labels=None,
    labels=None,
    settings=TextSettings,
    read=splits,
    blank=blank,
    objective=perplexity.objective(
      lambda batch: next_labels(batch["labels"]), objective.TOKENS
    ),
    samples=answers.samples,
    describe=lambda _, model: describe(settings, *data(model), model.folder),
  )


TASK = OwnTask(_NAME, TextSettings, _open)
