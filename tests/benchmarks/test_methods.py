"""The table of methods: it lacks none, and its configs are valid."""

import pytest

from benchmarks import methods
from experiments.cli import config_flag
from experiments.sweeps import plan, trials
from tests.methods.peft_methods import kernel_methods

STEPS = 40


def settings(name, seed=0):
  changes = methods.changes(name, STEPS, seed)
  [trial] = plan.of(config_flag.choose("quickstart.py")).make([changes])
  return trial


def test_no_method_is_left_out():
  found = {settings(name).settings.lora.method for name in methods.ROWS}
  assert found == kernel_methods() - {"fused_lora"}


@pytest.mark.parametrize("name", methods.ROWS)
def test_the_seeds_of_a_method_train_together(name):
  changes = [methods.changes(name, STEPS, seed) for seed in range(2)]
  made = plan.of(config_flag.choose("quickstart.py")).make(changes)
  assert all(trial.settings.train.steps == STEPS for trial in made)
  assert len(trials.packs(made, 2)) == 1


def test_the_number_of_steps_is_that_of_the_schedule():
  assert settings("adalora").settings.lora.options["total_step"] == STEPS


def test_a_picture_is_drawn(tmp_path):
  few = {"trained": 1000, "accuracy": 0.8, "range": 0.1}
  many = {"trained": 90000, "accuracy": 0.9, "range": 0.2}
  methods.draw(tmp_path / "made.png", {"vera": few, "lora": many}, "title")
  assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
