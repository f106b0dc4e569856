"""The trials of a sweep: listed by a config, as settings, and who trains together.

A config's file lists them in a function beside `get_config` (big_vision's convention):

    def sweep(add):
      for rate in (1e-3, 3e-3):
        for seed in range(3):
          add(**{"train.learning_rate": rate, "seed": seed})
"""

import copy
import dataclasses
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.cli import config_flag
from lorax_flax.errors import LoraxError
from lorax_flax.jobs import settings
from lorax_flax.jobs.settings import Settings
from lorax_flax.train import trials as together

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
    settings: what it is.
  """

  number: int
  changes: Mapping[str, Any]
  fields: Mapping[str, Any]
  settings: Settings

  @property
  def name(self) -> str:
    """Of its folder."""
    return f"trial-{self.number:03}"

  def __str__(self) -> str:
    return ", ".join(f"{name} {show(x)}" for name, x in self.changes.items())


@dataclass(frozen=True)
class Unit:
  """Trials that train together, in one program; or one alone.

  Attributes:
    trials: in their order.
    why: these are not with the first unit's.
  """

  trials: tuple[Trial, ...]
  why: str

  @property
  def name(self) -> str:
    """Of the folder with what they have in common; other trials have another."""
    numbers = ",".join(str(trial.number) for trial in self.trials)
    return f"together-{self.trials[0].number:03}-{zlib.crc32(numbers.encode()):08x}"

  def __str__(self) -> str:
    first, last = self.trials[0], self.trials[-1]
    return first.name if first is last else f"{first.name} to {last.number:03}"


def listed(spec: str) -> list[dict[str, Any]] | None:
  """The changes that the `sweep(add)` of a config's file lists; None: it has none.

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
  config: ConfigDict,
  changes: Sequence[Mapping[str, Any]],
  overridden: Collection[str] = (),
) -> list[Trial]:
  """Trials of a config.

  Args:
    config: what all have in common.
    changes: what each sets, by field.
    overridden: fields given on the command line, for all.

  Raises:
    LoraxError: a field or a value that can't be; two trials that are the same.
  """
  found: dict[str, Trial] = {}
  named = dict.fromkeys(name for own in changes for name in own)
  for number, own in enumerate(changes):
    try:
      if both := [name for name in own if name in overridden]:
        raise LoraxError(
          f"config.{both[0]} is given for all trials, and is what they differ in"
        )
      wanted = settings.convert(_changed(config, own), [*overridden, *own])
    except LoraxError as error:
      raise LoraxError(f"trial {number} ({_of(own)}): {error}") from error
    what = json.dumps(wanted.to_json(), sort_keys=True)
    if what in found:
      raise LoraxError(
        f"trials {found[what].number} and {number} are the same: {_of(own)}"
      )
    found[what] = Trial(number, own, own, wanted)
  return [
    dataclasses.replace(t, fields=_fields(config, t, named)) for t in found.values()
  ]


def _fields(config: ConfigDict, trial: Trial, names: Collection[str]) -> dict[str, Any]:
  return {
    name: trial.changes[name] if name in trial.changes else _value(config, name)
    for name in names
  }


def _value(config: ConfigDict, name: str) -> Any:
  value: Any = config
  for part in name.split("."):
    value = value[part]
  return value


def _of(changes: Mapping[str, Any]) -> str:
  named = ", ".join(f"{name}={show(value)}" for name, value in changes.items())
  return named or "no change"


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  new = copy.deepcopy(config)
  for name, value in changes.items():
    config_flag.check_field(config, name)
    section, _, field = name.rpartition(".")
    within = _value(new, section) if section else new
    try:
      within[field] = value
    except (TypeError, ValueError) as error:
      raise LoraxError(
        f"config.{name} can't be {show(value)}, in place of {within[field]!r}"
      ) from error
  return new


def _plain(value: Any) -> Any:
  """A number of numpy's as Python's own."""
  return value.item() if isinstance(value, np.generic) else value


def show(value: Any) -> str:
  """A value for a person."""
  return f"{value:g}" if isinstance(value, float) else str(value)


def units(trials: Sequence[Trial], most: int) -> list[Unit]:
  """Who trains with whom: those that differ in data alone, `most` at a time."""
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
      found.append(Unit(tuple(group[i : i + most]), reasons))
  return found


def _shape(wanted: Settings) -> dict[str, Any]:
  """All that trials which train together have in common, by field."""
  values = dataclasses.asdict(wanted)
  found = {
    f"{section}.{name}": value
    for section, fields in values.items()
    if isinstance(fields, dict)
    for name, value in fields.items()
    if name not in _DATA.get(section, ())
  }
  found["init_adapter"] = wanted.init_adapter
  if _drops_by_length(wanted):
    # The order of the examples makes the lengths of the batches.
    found["seed (dropout's draws go by a batch's length: data.buckets=1 is one)"] = (
      wanted.train.seed
    )
  return found


def _drops_by_length(wanted: Settings) -> bool:
  """Whether dropout draws other numbers where a batch is padded to another length.

  A checkpoint's own rates are not known here, and count as dropout.
  """
  if wanted.data.buckets == 1:
    return False
  rates = (wanted.lora.dropout, wanted.model.dropout, wanted.model.head_dropout)
  return wanted.model.dropout is None or any(rates)
