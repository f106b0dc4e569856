"""Causal language modelling: rows of token ids, each predicted from those before it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from lorax_flax.data import sequences
from lorax_flax.data.config import DataSettings
from lorax_flax.errors import LoraxError
from lorax_flax.models.head import Head
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train import losses
from lorax_flax.train.objective import Objective, Throughput
from lorax_flax.train.token_scores import TokenScores, next_labels, token_scores

if TYPE_CHECKING:
  from lorax_flax.models.registry import Located

log = logging.getLogger(__name__)

_TRAIN, _HELD_OUT = "train", "validation"


@dataclass(frozen=True)
class FolderSettings(DataSettings):
  """Settings of token ids in a folder.

  Attributes:
    path: a folder with train.jsonl and validation.jsonl, whose lines
      `lorax_flax.data.sequences` reads.
  """

  path: str | None = None


def _objective(label_smoothing: float) -> Objective:
  """Cross entropy of the next token; loss and perplexity are means over tokens."""
  return Objective(
    loss=losses.next_token(label_smoothing),
    eval_loss=losses.next_token(),  # A perplexity is of the loss without smoothing.
    metrics=("perplexity",),
    primary="perplexity",
    predictions=lambda scores: None,
    throughput=Throughput("tokens", "attention_mask"),
    readout=_scores,
  )


def _scores(head: Head, x_BxTxD: jax.Array, batch: losses.Batch) -> TokenScores:
  return token_scores(head, x_BxTxD, next_labels(batch["labels"]))


def _read(settings: FolderSettings, model: Located) -> Splits:
  if settings.path is None:
    raise LoraxError(
      f"data.path: which folder has {_TRAIN}.jsonl and {_HELD_OUT}.jsonl?"
    )
  folder = Path(settings.path).expanduser()
  found = {}
  for name in (_TRAIN, _HELD_OUT):
    file = folder / f"{name}.jsonl"
    found[name], cut = sequences.read(
      file,
      max_length=settings.max_length,
      vocab_size=model.config.vocab_size,
      pad_id=getattr(model.config, "pad_token_id", None) or 0,
    )
    if cut.rows:
      total = len(found[name].labels_S) + cut.tokens
      log.info(
        f"{file}: {cut.rows:,} of {len(found[name]):,} examples are cut to "
        f"data.max_length = {settings.max_length} tokens; {cut.tokens:,} of {total:,} "
        "tokens are left out"
      )
  return Splits(found.pop(_TRAIN), found)


TASK = Task(
  name="next_token",
  model="causal-lm",
  num_labels=None,
  labels=None,
  settings=FolderSettings,
  read=_read,
  blank=lambda model, length: sequences.blank(length),
  objective=_objective,
)
