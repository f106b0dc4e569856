"""Tasks: what is learnt, from which rows, judged by which metrics."""

from lorax_flax.data.tasks import TASKS as _DATASETS
from lorax_flax.tasks import causal_lm, classification, regression, texts
from lorax_flax.tasks.task import TASKS

TASKS |= {
  name: (classification if dataset.labels else regression).task(dataset)
  for name, dataset in _DATASETS.items()
}
TASKS["next_token"] = causal_lm.TASK
TASKS["texts"] = texts.TASK
