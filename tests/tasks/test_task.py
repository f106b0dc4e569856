"""The table of tasks, and a user's own row of it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import run
from experiments.cli import command, config_flag, fields
from lorax_flax.data import sequences, tasks
from lorax_flax.data.config import DataSettings
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.errors import LoraxError
from lorax_flax.tasks import task
from lorax_flax.tasks.classification import GlueSettings
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train.objective import Objective
from tests.experiments import peers, token_ids

LENGTH = 8
OWN = ("e2e", "images", "next_token", "seq2seq", "texts")


def test_every_dataset_and_next_token_is_a_row():
  assert set(task.TASKS) == {*tasks.TASKS, *OWN, "digits_0_4", "digits_5_9"}
  assert task.of(GlueSettings("stsb")).labels == ("score",)
  assert task.of(GlueSettings("rte")).num_labels == 2


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"task": "rt"}, "did you mean 'rte'"),
    ({"task": "next_token", "glue_dir": "glue"}, "glue_dir is of no use to the task"),
    ({"task": "rte", "path": "there"}, "data.path is of no use to the task rte"),
    ({"path": "there", "task": "rte"}, "There are: .*data.glue_dir, data.max_length"),
    ({"glue_dir": "glue"}, "no use to the task headlines.* There are: data.buckets, "),
    ({"task": "rte", "glue_dri": "glue"}, "did you mean 'data.glue_dir'"),
  ],
)
def test_what_a_task_does_not_read_is_an_error(fields, message):
  texts = {f"data.{name}": text for name, text in fields.items()}
  with pytest.raises(LoraxError, match=message):
    config_flag.choose("quickstart.py", texts).settings()


def test_a_field_of_another_task_may_be_unset():
  texts = {"data.path": "None", "data.task": "rte", "data.glue_dir": "there"}
  found = config_flag.choose("gpt3_175b.py", texts).settings().data
  assert found == GlueSettings("rte", 2048, 2, glue_dir="there")


def test_settings_of_another_task_are_an_error():
  with pytest.raises(LoraxError, match="rte reads GlueSettings, and data is DataSet"):
    task.of(DataSettings("rte"))


@dataclass(frozen=True, kw_only=True)
class MySettings(DataSettings):
  """Settings of the examples below.

  Attributes:
    modulus: the sum of a row's tokens is its label, by this modulus.
    names: of the splits.
    longest: whether rows are long.
  """

  modulus: int
  buckets: int = 1
  names: Mapping[str, str] = field(default_factory=lambda: {"test": "held_out"})
  longest: bool = False


def _rows(count, seed, modulus):
  ids = np.random.default_rng(seed).integers(1, token_ids.VOCAB, (count, LENGTH))
  values, offsets = ragged(list(ids))
  return Tokens(
    values, offsets, pad_id=0, labels_N=(ids.sum(-1) % modulus).astype(np.int32)
  )


def _loss(logits_BxTxV, batch):
  """How far the mean of all logits is from the label."""
  mean_B = logits_BxTxV.astype(jnp.float32).mean((1, 2))
  return jnp.square(mean_B - batch["labels"].astype(jnp.float32))


MINE = Task(
  name="mine",
  model="causal-lm",
  num_labels=None,
  labels=None,
  settings=MySettings,
  read=lambda settings, model: Splits(
    _rows(16, 0, settings.modulus),
    {settings.names["test"]: _rows(6, 1, settings.modulus)},
  ),
  blank=lambda model, length: sequences.blank(length),
  objective=lambda label_smoothing: Objective(
    _loss, (), "eval_loss", predictions=lambda logits: None
  ),
)


def test_a_row_of_the_users_own_trains_through_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(task.TASKS, "mine", MINE)
  peers.tiny("gpt2", tmp_path / "base")
  changes = {"data.task": "mine", "data.modulus": 2, "train.label_smoothing": 0.0}
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


def _parse(*arguments):
  values = flags.FlagValues()
  config_flag.define(values)
  command.parse(values, ["run", *arguments])
  return config_flag.read(values)


@pytest.fixture
def registers(tmp_path, monkeypatch):
  """A config's file that registers the task, as a user's does."""
  monkeypatch.setattr(task, "TASKS", dict(task.TASKS))
  file = tmp_path / "mine.py"
  file.write_text(
    "from experiments.configs import common\n"
    "from lorax_flax.tasks import task\n"
    "from tests.tasks.test_task import MINE\n"
    "task.TASKS['mine'] = MINE\n"
    "def get_config():\n"
    "  config = common.base()\n"
    "  config.data.task = 'mine'\n"
    "  config.data.names = {'test': 'here'}\n"
    "  config.train.steps = 1\n"
    "  return config\n"
  )
  return f"--config={file}"


@pytest.mark.parametrize(
  ("arguments", "changed"),
  [
    ((), {}),
    (("--config.data.longest",), {"longest": True}),
    (("--config.data.longest=true",), {"longest": True}),
    (("--noconfig.data.longest",), {"longest": False}),
    (("--config.data.names.test=b",), {"names": {"test": "b"}}),
    (("--config.data.buckets=3",), {"buckets": 3}),
  ],
)
def test_a_tasks_own_setting_is_a_flag(registers, arguments, changed):
  found = _parse("--config.data.modulus=3", *arguments, registers).settings().data
  usual = MySettings(task="mine", modulus=3, names={"test": "here"})
  assert found == dataclasses.replace(usual, **changed)


def test_a_tasks_own_setting_is_in_the_help(registers):
  text = config_flag.help_text([registers, "--config.data.modulus=2"])
  assert "\n  data.modulus = None\n      the sum of a row's tokens is its" in text
  assert "\n  data.buckets = 1\n" in text
  assert "\n  data.path (next_token, e2e, seq2seq, texts, images)" in text


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("data.longest=true", "config.data.modulus can't be None: it takes int"),
    ("data.modulus=half", "config.data.modulus can't be 'half': it takes int"),
    ("data.modulos=2", "did you mean 'data.modulus'"),
    ("data.tfds_dir=there", "data.tfds_dir is of no use to the task mine: .*modulus"),
  ],
)
def test_a_wrong_setting_of_a_task_is_named(registers, argument, message):
  with pytest.raises(LoraxError, match=message):
    _parse(registers, f"--config.{argument}").settings()


def test_two_tasks_may_not_declare_one_field_by_two_types(registers):
  @dataclass(frozen=True)
  class Paths(DataSettings):
    path: int = 0

  task.TASKS["other"] = dataclasses.replace(MINE, settings=Paths)
  with pytest.raises(LoraxError, match=r"task other declares data.path as int, and an"):
    fields.known()


def test_settings_that_are_no_dataclass_of_their_own_are_an_error():
  class Forgotten(DataSettings):
    path: str = ""

  with pytest.raises(LoraxError, match="its settings Forgotten are no frozen datacla"):
    dataclasses.replace(MINE, settings=Forgotten)


def test_a_config_file_may_define_a_tasks_settings(tmp_path, monkeypatch):
  monkeypatch.setattr(task, "TASKS", dict(task.TASKS))
  file = tmp_path / "mine.py"
  file.write_text(
    "from __future__ import annotations\n"
    "import dataclasses\n"
    "from collections.abc import Sequence\n"
    "from experiments.configs import common\n"
    "from lorax_flax.data.config import DataSettings\n"
    "from lorax_flax.tasks import task\n"
    "from tests.tasks.test_task import MINE\n"
    "@dataclasses.dataclass(frozen=True)\n"
    "class Own(DataSettings):\n"
    "  picked: Sequence[int] = ()\n"
    "task.TASKS['own'] = dataclasses.replace(MINE, settings=Own)\n"
    "def get_config():\n"
    "  config = common.base()\n"
    "  config.data.task = 'own'\n"
    "  config.train.steps = 1\n"
    "  return config\n"
  )
  found = _parse(f"--config={file}", "--config.data.picked=1,2").settings()
  assert found.data.picked == (1, 2)
  # The file is run again for its function `sweep`, and defines the class again.
  assert config_flag.function(str(file), "sweep") is None
  assert task.of(found.data).name == "mine"
