"""Settings of training, and its durations in steps."""

import dataclasses
import math
import typing
from dataclasses import dataclass

from lorax_flax.errors import LoraxError, check_known, unknown
from lorax_flax.train.optim import SCHEDULES
from lorax_flax.train.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class TrainConfig:
  """Settings of training: all but the model, the adapter and the data.

  A duration is given in one of several units, by the suffix of its name; the others of
  the same duration are None.

  Attributes:
    steps, epochs: length of training, one of the two; epochs may be a fraction.
    batch_size: number of examples in an optimiser step.
    eval_batch_size: number of examples in an evaluation step.
    accumulation: number of microbatches that a batch is split into, to save memory.
    learning_rate: at the end of the warm-up.
    schedule: "linear" or "cosine" decay to zero, or "constant", after the warm-up.
    warmup_steps, warmup_epochs, warmup_fraction: linear rise from zero; at most one of
      the three, none for no warm-up. The fraction is of all steps, rounded up.
    optimizer: "adamw", "adafactor", "lion", "muon" (of the factors, with AdamW for all
      other leaves) or "sgd".
    lora_plus_ratio: learning rate of the factors b over that of a (LoRA+).
    weight_decay: decoupled (AdamW); biases and norms are exempt.
    b1, b2, eps: hyperparameters of AdamW; Lion has the first two.
    momentum: of SGD, and of Muon.
    grad_clip: largest global norm of the gradient; inf for no clipping.
    label_smoothing: share of a label spread over all classes.
    seed: seed of new weights, the order of examples and dropout.
    log_steps: number of steps from one line of metrics to the next.
    save_steps, save_epochs: checkpoints besides the one after each evaluation; at most
      one of the two.
    save_seconds: largest time from one checkpoint to the next.
    on_nonfinite: reaction to a step whose loss or gradient is not finite: "stop" the
      run, or "skip" the step, which then changes nothing.
  """

  steps: int | None = None
  epochs: float | None = None
  batch_size: int = 32
  eval_batch_size: int = 64
  accumulation: int = 1
  learning_rate: float = 1e-3
  schedule: str = "linear"
  optimizer: str = "adamw"
  lora_plus_ratio: float = 1.0
  warmup_steps: int | None = None
  warmup_epochs: float | None = None
  warmup_fraction: float | None = None
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  momentum: float = 0.9
  grad_clip: float = 1.0
  label_smoothing: float = 0.0
  seed: int = 0
  log_steps: int = 20
  save_steps: int | None = None
  save_epochs: float | None = None
  save_seconds: float = 60.0
  on_nonfinite: str = "stop"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check_number(field, getattr(self, field.name))
    for names in DURATIONS:
      if len(_given(self, names)) > 1:
        raise LoraxError(f"give one of {_names(names)}, not several")
    if not _given(self, ("steps", "epochs")):
      raise LoraxError("how long to train? Give train.steps or train.epochs")
    check_known("train.schedule", self.schedule, SCHEDULES)
    check_known("train.optimizer", self.optimizer, OPTIMIZERS)
    for field in dataclasses.fields(self):
      if field.name in _OWN and getattr(self, field.name) != field.default:
        _check_read(field.name, self.optimizer)
    if self.on_nonfinite not in ON_NONFINITE:
      raise LoraxError(unknown("train.on_nonfinite", self.on_nonfinite, ON_NONFINITE))
    for name in _given(self, _POSITIVE):
      if getattr(self, name) <= 0:
        value = getattr(self, name)
        raise LoraxError(f"train.{name} must be more than 0, not {value}")
    for name in _given(self, _NOT_NEGATIVE):
      if getattr(self, name) < 0:
        value = getattr(self, name)
        raise LoraxError(f"train.{name} can't be negative, and is {value}")
    for name in ("b1", "b2", "momentum", "label_smoothing"):
      if not 0 <= getattr(self, name) < 1:
        raise LoraxError(f"train.{name} must be in [0, 1), not {getattr(self, name)}")
    if self.warmup_fraction is not None and self.warmup_fraction > 1:
      raise LoraxError(
        f"train.warmup_fraction is of all steps, at most 1, not {self.warmup_fraction}"
      )
    if self.batch_size % self.accumulation:
      raise LoraxError(
        f"train.batch_size {self.batch_size} can't be split into "
        f"train.accumulation = {self.accumulation} equal parts"
      )


def _check_read(name: str, optimizer: str) -> None:
  reads = OPTIMIZERS[optimizer].reads
  if name not in reads:
    own = ", ".join(reads) or "none of its own"
    raise LoraxError(f"train.{name} is of no use to {optimizer}, which reads {own}")


ON_NONFINITE = ("stop", "skip")

# The fields that some optimisers read and others don't.
_OWN = {name for each in OPTIMIZERS.values() for name in each.reads}

# The units that one duration may be given in.
DURATIONS = (
  ("steps", "epochs"),
  ("warmup_steps", "warmup_epochs", "warmup_fraction"),
  ("save_steps", "save_epochs"),
)
_POSITIVE = (
  *("steps", "epochs", "batch_size", "eval_batch_size", "accumulation"),
  *(
    "learning_rate",
    "lora_plus_ratio",
    "eps",
    "grad_clip",
    "log_steps",
    "save_steps",
    "save_epochs",
  ),
  "save_seconds",
)
_NOT_NEGATIVE = (*DURATIONS[1], "weight_decay", "seed")


@dataclass(frozen=True)
class Durations:
  """The durations of a run in steps.

  Attributes:
    total: number of optimiser steps of the run.
    epoch: steps of one epoch.
    warmup: steps of the warm-up.
    save: steps from one extra checkpoint to the next; None for none.
  """

  total: int
  epoch: int
  warmup: int
  save: int | None


def durations(config: TrainConfig, steps_per_epoch: int) -> Durations:
  """Every duration of `config` in steps; parts of a step are rounded up.

  Raises:
    LoraxError: the warm-up is longer than the run.
  """
  total = _steps(config, ("steps", "epochs"), steps_per_epoch)
  assert total is not None  # TrainConfig makes sure of it.
  warmup = _steps(config, DURATIONS[1], steps_per_epoch, total) or 0
  if warmup > total:
    raise LoraxError(f"the warm-up takes {warmup} steps, and the run {total}")
  save = _steps(config, DURATIONS[2], steps_per_epoch)
  return Durations(total, steps_per_epoch, warmup, save)


def _steps(
  config: TrainConfig, names: tuple[str, ...], epoch: int, total: int = 0
) -> int | None:
  unit = {"steps": 1, "epochs": epoch, "fraction": total}
  for name in _given(config, names):
    # The product is rounded first: 0.07 * 100 is 7.000000000000001, and means 7.
    return math.ceil(round(getattr(config, name) * unit[name.split("_")[-1]], 6))
  return None


def _given(config: TrainConfig, names: tuple[str, ...]) -> list[str]:
  return [name for name in names if getattr(config, name) is not None]


def _names(names: tuple[str, ...]) -> str:
  return " and ".join(f"train.{name}" for name in names)


def _check_number(field: dataclasses.Field, value: object) -> None:
  kinds = typing.get_args(field.type) or (field.type,)
  if str in kinds or value is None:
    return
  integer, name = int in kinds, field.name
  if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
    kind = "a whole number" if integer else "a number"
    raise LoraxError(f"train.{name} must be {kind}, not {value!r}")
  if math.isnan(value):
    raise LoraxError(f"train.{name} is not a number")
  if math.isinf(value) and name not in _MAY_BE_INFINITE:
    raise LoraxError(f"train.{name} must be finite")


_MAY_BE_INFINITE = ("grad_clip", "save_seconds")
