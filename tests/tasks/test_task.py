"""The table of tasks, and a user's own row of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import run
from lorax_flax.data import sequences, tasks
from lorax_flax.data.config import DataSettings
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.errors import LoraxError
from lorax_flax.tasks import task
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train.objective import Objective
from tests.experiments import peers, token_ids

LENGTH = 8


def test_every_dataset_and_next_token_is_a_row():
  assert set(task.TASKS) == {*tasks.TASKS, "next_token"}
  assert task.of(DataSettings("stsb")).labels == ("score",)
  assert task.of(DataSettings("rte")).num_labels == 2


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (DataSettings("rt"), "did you mean 'rte'"),
    (DataSettings("next_token", glue_dir="glue"), "glue_dir is of no use to the task"),
    (DataSettings("rte", path="there"), "data.path is of no use to the task rte"),
  ],
)
def test_what_a_task_does_not_read_is_an_error(settings, message):
  with pytest.raises(LoraxError, match=message):
    task.of(settings)


def _rows(count, seed):
  ids = np.random.default_rng(seed).integers(1, token_ids.VOCAB, (count, LENGTH))
  values, offsets = ragged(list(ids))
  return Tokens(values, offsets, pad_id=0, labels_N=(ids.sum(-1) % 2).astype(np.int32))


def _loss(logits_BxTxV, batch):
  """How far the mean of all logits is from the label."""
  mean_B = logits_BxTxV.astype(jnp.float32).mean((1, 2))
  return jnp.square(mean_B - batch["labels"].astype(jnp.float32))


MINE = Task(
  name="mine",
  model="causal-lm",
  num_labels=None,
  labels=None,
  settings=(),
  read=lambda settings, model: Splits(_rows(16, 0), {"held_out": _rows(6, 1)}),
  blank=lambda model, length: sequences.blank(length),
  objective=lambda label_smoothing: Objective(
    _loss, (), "eval_loss", predictions=lambda logits: None
  ),
)


def test_a_row_of_the_users_own_trains_through_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(task.TASKS, "mine", MINE)
  peers.tiny("gpt2", tmp_path / "base")
  changes = {"data.task": "mine", "train.label_smoothing": 0.0}
  settings = token_ids.shrunk("gpt3_175b.py", tmp_path / "base", None, **changes)
  result = run.run(settings, tmp_path / "run")
  assert result["examples_evaluated"] == 6
  # Its work is counted in examples.
  assert result["examples"] == token_ids.STEPS * token_ids.BATCH
  assert "tokens" not in result
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  losses = [
    line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line
  ]
  assert losses[-1] < losses[0]
