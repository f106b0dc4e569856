"""Tasks: what is learnt, from which rows, judged by which metrics."""

from lorax_flax.data.tasks import TASKS as _DATASETS
from lorax_flax.tasks import (
  causal_lm,
  classification,
  digits,
  e2e,
  images,
  regression,
  seq2seq,
  texts,
)
from lorax_flax.tasks.task import TASKS

TASKS |= {
  name: (classification if dataset.labels else regression).task(dataset)
  for name, dataset in _DATASETS.items()
}
TASKS |= {task.name: task for task in (digits.task(0, 4), digits.task(5, 9))}
TASKS["next_token"] = causal_lm.TASK
TASKS["e2e"] = e2e.TASK
TASKS["seq2seq"] = seq2seq.TASK
TASKS["texts"] = texts.TASK
TASKS["images"] = images.TASK
