"""E2E: a language model writes texts for meaning representations of restaurants.

As the LoRA paper's code has it: a prompt, a token that separates, a space and the
reference, and the token that ends texts; the loss is of the reference and its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_flax.data import e2e, sequences
from lorax_flax.data.config import DataSettings
from lorax_flax.data.e2e import Group, Pair
from lorax_flax.data.language import encoding
from lorax_flax.data.language.gather import gather
from lorax_flax.data.own.table import Row
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.errors import LoraxError
from lorax_flax.tasks import perplexity
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train import objective
from lorax_flax.train.token_scores import next_labels

if TYPE_CHECKING:
  from lorax_flax.data.sequences import Sequences
  from lorax_flax.models.registry import Located

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class E2ESettings(DataSettings):
  """Settings of E2E's data.

  Attributes:
    path: a folder with trainset.csv, devset.csv and testset_w_refs.csv, of the columns
      mr and ref.
    tfds_dir: in place of path, a folder of prepared TFDS data. It has the cleaned E2E
      alone, whose scores do not compare with the paper's.
    train_rows: largest number of rows to train on, evenly spread; None takes all.
    eval_rows: the same of the rows that are evaluated while training.
  """

  path: str | None = None
  tfds_dir: str | None = None
  train_rows: int | None = None
  eval_rows: int | None = None

  def __post_init__(self):
    super().__post_init__()
    for name in ("train_rows", "eval_rows"):
      if (rows := getattr(self, name)) is not None and rows < 1:
        raise LoraxError(f"data.{name} must be at least 1, not {rows}")


def groups(settings: E2ESettings, split: str) -> list[Group]:
  """The meaning representations of a split, each with all its references."""
  return e2e.grouped(_pairs(settings, split))


def prompt(tokenizer: Tokenizer, linearized: str) -> str:
  """A prompt as the model is to go on from it, with the token that separates.

  Raises:
    LoraxError: the tokenizer has no token for the beginning of a text, nor for its end.
  """
  for name in ("bos_token", "eos_token"):
    if (token := tokenizer.special.get(name)) is not None:
      return linearized + token
  raise LoraxError("the tokenizer has neither a bos_token nor an eos_token")


def _pairs(settings: E2ESettings, split: str) -> list[Pair]:
  return e2e.read(split, path=settings.path, tfds_dir=settings.tfds_dir)


def _read(settings: E2ESettings, model: Located) -> Splits:
  most = {TRAIN: settings.train_rows, VALIDATION: settings.eval_rows}
  rows = {
    split: _encoded(settings, model, e2e.spread(_pairs(settings, split), number))
    for split, number in most.items()
  }
  return Splits(rows.pop(TRAIN), rows)


def _encoded(settings: E2ESettings, model: Located, pairs: list[Pair]) -> Sequences:
  tokenizer = load_tokenizer(model.folder)
  rows = [
    Row(
      pair.place,
      {
        "prompt": prompt(tokenizer, pair.prompt),
        "completion": f" {pair.reference}",
      },
    )
    for pair in pairs
  ]
  return gather(
    Path(settings.path or settings.tfds_dir or ""),
    encoding.completions(rows, tokenizer),
    max_length=settings.max_length,
    vocab_size=model.config.vocab_size,
    pad_id=getattr(model.config, "pad_token_id", None) or 0,
    skip=False,
  ).rows


TASK = Task(
  name="e2e",
  model="causal-lm",
  num_labels=None,
  labels=None,
  settings=E2ESettings,
  read=_read,
  blank=lambda model, length: sequences.blank(length),
  objective=perplexity.objective(
    lambda batch: next_labels(batch["labels"]), objective.TOKENS
  ),
)
