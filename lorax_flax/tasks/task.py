"""What each kind of task brings to a job: classify.py and next_token.py make one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorax_flax.data.pipeline import Rows
from lorax_flax.models.family import Task as ModelTask
from lorax_flax.models.registry import Loaded, Outline
from lorax_flax.train import step as steps
from lorax_flax.train.losses import Loss


class Splits(NamedTuple):
  """Rows to train on, and to evaluate by the split's name."""

  train: Rows
  evaluation: Mapping[str, Rows]


@dataclass(frozen=True)
class Kind:
  """A kind of task.

  Attributes:
    name: of the task, for people.
    model: what the outputs of its models are.
    num_labels: of the head; None where that is the model's own.
    labels: names of the outputs; None where they are not classes.
    read: (model, takes a line for the user) -> the rows.
    blank: (model, length) -> one row of that many tokens, for its shapes.
    loss: of one example each; a batch's weights say what each counts.
    eval_loss: in evaluations.
    predictions: what metrics look at of an evaluation's logits.
    metrics: keys of `lorax_flax.train.metrics.METRICS`.
    primary: the one of them that says which evaluation is the best.
  """

  name: str
  model: ModelTask
  num_labels: int | None
  labels: Sequence[str] | None
  read: Callable[[Loaded, Callable[[str], None]], Splits]
  blank: Callable[[Outline, int], Rows]
  loss: Loss
  eval_loss: Loss
  predictions: steps.Predictions
  metrics: Sequence[str]
  primary: str
