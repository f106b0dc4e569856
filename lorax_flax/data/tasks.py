"""Table of tasks: their texts, labels, metrics and splits."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorax_flax.errors import LoraxError, check_known


@dataclass(frozen=True)
class Task:
  """One row of the table.

  Attributes:
    name: as in a config.
    text: the columns of the one text, or of the two.
    labels: the classes by number; empty for regression.
    source: "glue" (tensorflow-datasets, or a folder of TSVs) or "headlines".
    metrics: of evaluation, by GLUE's names.
    primary: the metric that picks the best step. With several evaluation splits it is
      computed over all their examples (the paper's "overall accuracy" of MNLI).
    evaluation: the evaluation splits.
    train: the training split.
  """

  name: str
  text: tuple[str, ...]
  labels: tuple[str, ...]
  source: str = "glue"
  metrics: tuple[str, ...] = ("accuracy",)
  primary: str = "accuracy"
  evaluation: tuple[str, ...] = ("validation",)
  train: str = "train"

  def __post_init__(self):
    check_known(f"metric of {self.name}", self.primary, self.metrics)
    if len(self.text) not in (1, 2):
      raise LoraxError(f"task {self.name}: one or two texts, not {len(self.text)}")

  @property
  def regression(self) -> bool:
    return not self.labels

  @property
  def num_labels(self) -> int:
    """Outputs of the head: one per class, or the one number."""
    return len(self.labels) or 1

  @property
  def splits(self) -> tuple[str, ...]:
    return (self.train, *self.evaluation)


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")

# Column and class names, and the classes' order, are TFDS's, which are the Hugging Face
# hub's too. The primary metrics are those of the LoRA paper's table 2 (arXiv
# 2106.09685); WNLI is not in it.
_ROWS = (
  Task(
    "mnli",
    ("premise", "hypothesis"),
    ("entailment", "neutral", "contradiction"),
    evaluation=("validation_matched", "validation_mismatched"),
  ),
  Task("sst2", ("sentence",), ("negative", "positive")),
  Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
  Task(
    "cola",
    ("sentence",),
    ("unacceptable", "acceptable"),
    metrics=("matthews_correlation",),
    primary="matthews_correlation",
  ),
  Task("qnli", ("question", "sentence"), _ENTAILED),
  Task(
    "qqp",
    ("question1", "question2"),
    ("not_duplicate", "duplicate"),
    metrics=("accuracy", "f1"),
  ),
  Task("rte", _PAIR, _ENTAILED),
  Task("stsb", _PAIR, (), metrics=("pearson", "spearman"), primary="pearson"),
  Task("headlines", ("text",), ("sincere", "sarcastic"), source="headlines"),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ROWS}


def get(name: str) -> Task:
  """The task of that name.

  Raises:
    LoraxError: no such task; the message has the nearest names.
  """
  check_known("task", name, TASKS)
  return TASKS[name]
