"""Trials of a sweep: the listed ones, their settings, and packs that train together.

A config's file lists them in a function beside `get_config` (big_vision's convention):

    def sweep(add):
      for rate in (1e-3, 3e-3):
        for seed in range(3):
          add(**{"train.learning_rate": rate, "seed": seed})
"""

import dataclasses
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.cli import config_dict, config_flag
from experiments.cli.config_dict import Values
from lorax_flax.errors import LoraxError, prefixed
from lorax_flax.jobs.settings import Settings
from lorax_flax.methods import METHODS
from lorax_flax.train import trials as together
from lorax_flax.train.optimizers import OPTIMIZERS

# The fields that are data in one program, so that trials may differ in them.
_DATA = {
  "train": together.MAY_DIFFER,
  "lora": ("rank", "alpha", "use_rslora"),
}


@dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  Attributes:
    number: from 0.
    changes: fields of the config that it sets, "train.learning_rate", to values.
    fields: these, and those that other trials set, with the config's own values.
    settings: the config with the changes.
  """

  number: int
  changes: Mapping[str, Any]
  fields: Mapping[str, Any]
  settings: Settings

  @property
  def name(self) -> str:
    """Name of its folder."""
    return f"trial-{self.number:03}"

  def __str__(self) -> str:
    return ", ".join(f"{name} {show(x)}" for name, x in self.changes.items())


@dataclass(frozen=True)
class Pack:
  """Trials that train together, in one program; or one alone.

  Attributes:
    trials: members, in the sweep's order.
    why: reason that these are not in the first pack.
  """

  trials: tuple[Trial, ...]
  why: str

  @property
  def name(self) -> str:
    """Name of the folder with what the trials share; other trials have another."""
    numbers = ",".join(str(trial.number) for trial in self.trials)
    return f"together-{self.trials[0].number:03}-{zlib.crc32(numbers.encode()):08x}"

  def __str__(self) -> str:
    first, last = self.trials[0], self.trials[-1]
    return first.name if first is last else f"{first.name} to {last.number:03}"


def listed(spec: str) -> list[dict[str, Any]] | None:
  """Changes that the `sweep(add)` of a config's file lists; None: it has none.

  Raises:
    LoraxError: what goes wrong in it; it lists nothing.
  """
  sweep = config_flag.function(spec, "sweep")
  if sweep is None:
    return None
  file, _ = config_flag.find(spec)
  found: list[dict[str, Any]] = []

  def add(**changes: Any) -> None:
    found.append({name: _plain(value) for name, value in changes.items()})

  with config_flag.running(file):
    sweep(add)
    if not found:
      raise LoraxError("sweep(add) lists no trial: it never calls add")
  return found


def make(
  config: Values,
  changes: Sequence[Mapping[str, Any]],
  overridden: Collection[str] = (),
) -> list[Trial]:
  """Trials of a config.

  Args:
    config: values that all have in common.
    changes: values that each sets, by field.
    overridden: fields given on the command line, for all.

  Raises:
    LoraxError: a field or a value that can't be; two trials that are the same.
  """
  found: dict[str, tuple[int, Mapping[str, Any], Settings]] = {}
  for number, own in enumerate(changes):
    with prefixed(f"trial {number} ({_of(own)})"):
      if both := [name for name in own if name in overridden]:
        raise LoraxError(
          f"config.{both[0]} is given for all trials, and is what they differ in"
        )
      changed = config
      for name, value in own.items():
        changed = config_dict.change(changed, name, value)
      settings = config_dict.settings(changed, [*overridden, *own])
    key = json.dumps(settings.to_json(), sort_keys=True)
    if key in found:
      raise LoraxError(f"trials {found[key][0]} and {number} are the same: {_of(own)}")
    found[key] = number, own, settings
  named = dict.fromkeys(name for own in changes for name in own)
  usual = {name: config_dict.value(config, name) for name in named}
  return [
    Trial(number, own, {**usual, **own}, settings)
    for number, own, settings in found.values()
  ]


def _of(changes: Mapping[str, Any]) -> str:
  named = ", ".join(f"{name}={show(value)}" for name, value in changes.items())
  return named or "no change"


def _plain(value: Any) -> Any:
  """Python's own number of a NumPy scalar."""
  return value.item() if isinstance(value, np.generic) else value


def show(value: Any) -> str:
  """A value for a person."""
  return f"{value:g}" if isinstance(value, float) else str(value)


def packs(trials: Sequence[Trial], most: int) -> list[Pack]:
  """Packs of trials that differ in data alone, `most` at a time."""
  groups: dict[str, list[Trial]] = {}
  for trial in trials:
    key = json.dumps(_shape(trial.settings), sort_keys=True, default=str)
    groups.setdefault(key, []).append(trial)
  first = _shape(trials[0].settings)
  found = []
  for group in groups.values():
    shape = _shape(group[0].settings)
    why = ", ".join(
      f"{name} {show(value)}"
      for name, value in shape.items()
      if first.get(name) != value
    )
    for i in range(0, len(group), most):
      part = f"at most {most} at a time" if i else ""
      reasons = "; ".join(filter(None, (why, part)))
      found.append(Pack(tuple(group[i : i + most]), reasons))
  return found


def check_turns(trials: Sequence[Trial]) -> None:
  """Raises LoraxError for a trial that would differ by when it has its turn."""
  for trial in trials:
    if _drops_by_length(trial.settings):
      raise LoraxError(
        f"--prune: {trial.name} has dropout, whose draws go by a batch's padded "
        "length, and that by which trials train beside it. Pad to one length, "
        "--config.data.buckets=1, or train without: --config.model.dropout=0.0"
      )


def _shape(settings: Settings) -> dict[str, Any]:
  """Everything that trials of one pack have in common, by field."""
  values = dataclasses.asdict(settings)
  found = {
    f"{section}.{name}": value
    for section, fields in values.items()
    if isinstance(fields, dict)
    for name, value in fields.items()
    if name not in _DATA.get(section, ())
  }
  found["init_adapter"] = settings.init_adapter
  method = METHODS.of_targets(settings.lora.method, settings.lora.options)
  if not OPTIMIZERS[settings.train.optimizer].by_element or not method.pads_rank:
    found["lora.rank"] = settings.lora.rank  # Padding would change the steps.
  if _drops_by_length(settings):
    # The order of the examples makes the lengths of the batches.
    found["seed (dropout's draws go by a batch's length: data.buckets=1 is one)"] = (
      settings.train.seed
    )
  return found


def _drops_by_length(settings: Settings) -> bool:
  """True if dropout draws other numbers where a batch is padded to another length.

  A checkpoint's own rates are not known here, and count as dropout.
  """
  if settings.data.buckets == 1:
    return False
  rates = (settings.lora.dropout, settings.model.dropout, settings.model.head_dropout)
  return settings.model.dropout is None or any(rates)
