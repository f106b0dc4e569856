import math

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.train.config import TrainConfig, durations


@pytest.mark.parametrize(
  ("given", "steps"),
  [
    ({"epochs": 3.0}, 30),
    ({"epochs": 0.25}, 3),
    ({"steps": 7}, 7),
  ],
)
def test_a_run_lasts_as_many_steps_as_its_unit_says(given, steps):
  assert durations(TrainConfig(**given), 10).total == steps


@pytest.mark.parametrize(
  ("given", "steps"),
  [
    ({}, 0),
    ({"warmup_steps": 4}, 4),
    ({"warmup_epochs": 0.5}, 5),
    # transformers' get_warmup_steps rounds up too.
    ({"warmup_fraction": 0.06}, math.ceil(100 * 0.06)),
    ({"warmup_fraction": 0.07}, 7),  # 100 * 0.07 is 7.000000000000001
  ],
)
def test_a_warmup_in_any_unit_becomes_steps(given, steps):
  assert durations(TrainConfig(epochs=10.0, **given), 10).warmup == steps


def test_saves_in_steps_or_epochs_or_not_at_all():
  assert durations(TrainConfig(epochs=1.0), 10).save is None
  assert durations(TrainConfig(epochs=1.0, save_steps=4), 10).save == 4
  assert durations(TrainConfig(epochs=1.0, save_epochs=0.5), 10).save == 5


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({}, "train.steps or train.epochs"),
    ({"steps": 3, "epochs": 1.0}, "train.steps and train.epochs"),
    (
      {"epochs": 1.0, "warmup_steps": 3, "warmup_fraction": 0.1},
      "train.warmup_fraction, not several",
    ),
    ({"epochs": 1.0, "schedule": "cosin"}, "did you mean 'cosine'"),
    ({"epochs": 1.0, "batch_size": 10, "accumulation": 4}, "4 equal parts"),
    ({"epochs": 1.0, "learning_rate": 0.0}, "train.learning_rate must be more than 0"),
    ({"epochs": 1.0, "learning_rate": "1e-4"}, "must be a number, not '1e-4'"),
    ({"epochs": 1.0, "batch_size": 2.5}, "must be a whole number, not 2.5"),
    ({"epochs": 1.0, "batch_size": True}, "must be a whole number"),
    ({"epochs": 1.0, "weight_decay": -0.1}, "can't be negative"),
    ({"epochs": 1.0, "warmup_fraction": 6}, "at most 1"),
    ({"epochs": 1.0, "b1": 1.0}, r"train.b1 must be in \[0, 1\)"),
    ({"epochs": math.nan}, "train.epochs is not a number"),
    ({"epochs": math.inf}, "train.epochs must be finite"),
    ({"epochs": -1.0}, "train.epochs must be more than 0"),
  ],
)
def test_a_bad_value_is_named(given, message):
  with pytest.raises(LoraxError, match=message):
    TrainConfig(**given)


def test_a_warmup_longer_than_the_run_is_an_error():
  with pytest.raises(LoraxError, match="11 steps, and the run 10"):
    durations(TrainConfig(steps=10, warmup_steps=11), 10)
