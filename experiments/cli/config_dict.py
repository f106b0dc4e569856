"""Settings from a ConfigDict, the only form that a config's file knows.

A config becomes a flat mapping, field name to value ("train.steps": 30), that flags and
the trials of a sweep change, and this becomes `Settings`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from typing import Any

from ml_collections import ConfigDict, config_dict

from experiments.cli import fields
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.jobs.settings import Settings
from lorax_flax.tasks import task as tasks
from lorax_flax.train.config import DURATIONS

_SCALARS = (bool, int, float, str)

# Field name to value. What is not set of the section data is the task's default.
Values = Mapping[str, Any]


def defaults() -> ConfigDict:
  """Every field with its default; None where it has none, or the task's."""
  config = ConfigDict()
  for field in fields.known().values():
    *sections, last = field.name.split(".")
    at = config
    for section in sections:
      if section not in at:
        at[section] = ConfigDict()
      at = at[section]
    default = None if field.of_task else field.default
    if field.plain in _SCALARS and default is not None and not field.optional:
      at[last] = default
      continue
    # What may be None, or have one of several types, is a reference: it alone may.
    scalar = field.plain in _SCALARS
    at[last] = config_dict.placeholder(field.plain if scalar else object)
    is_mapping = field.entries is not None
    at[last] = dict(default or {}) if is_mapping else default
  return config


def values(config: ConfigDict) -> Values:
  """Every field of a config, in the field's type; of the data, those that are set.

  Raises:
    LoraxError: an unknown field, or a value of another type.
  """
  known = fields.known()
  found = {name: field.default for name, field in known.items() if not field.of_task}
  for name, value in _flat(config.to_dict(), ""):
    if not (known[name].of_task and _unset(value)):
      found[name] = value
  return {name: fields.fit(known[name], x) for name, x in found.items()}


def _unset(value: Any) -> bool:
  return value is None or value == {}


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    name = f"{prefix}{key}"
    if name not in fields.known() and isinstance(value, Mapping):
      yield from _flat(value, f"{name}.")
    else:
      yield fields.find(name)[0].name, value


def change(values: Values, name: str, value: Any) -> Values:
  """The values with a field, or an entry of a mapping, set anew.

  Raises:
    LoraxError: no such field, or a value of another type.
  """
  field, key = fields.find(name)
  if key is None:
    return {**values, name: fields.fit(field, value)}
  old = values.get(field.name, field.default) or {}
  # Keys of patterns hold dots; those of a document, of any values, are nested by them.
  keys = key.split(".") if field.entries is Any else [key]
  if field.optional and keys[0] not in old:
    # A document is given in full: an entry that it lacks would be read by nobody.
    raise LoraxError(unknown("config field", name, [f"{field.name}.{k}" for k in old]))
  new = _nested(old, keys, fields.fit_entry(field, key, value))
  return {**values, field.name: new}


def _nested(old: Any, keys: list[str], value: Any) -> Any:
  if not keys:
    return value
  entries = old if isinstance(old, Mapping) else {}
  return {**entries, keys[0]: _nested(entries.get(keys[0]), keys[1:], value)}


def value(values: Values, name: str) -> Any:
  """The value of a field, or of a mapping's entry; None for what is not there.

  Raises:
    LoraxError: no such field, or no such task.
  """
  field, key = fields.find(name)
  found = complete(values).get(field.name)
  return found if key is None else (found or {}).get(key)


def complete(values: Values) -> Values:
  """The values of every field that a run of their task has.

  Raises:
    LoraxError: no such task, or a field is set that it does not read.
  """
  task = fields.fit(fields.known()["data.task"], values.get("data.task"))
  known = fields.of_task(task)
  for name, value in values.items():
    if name not in known and not _unset(value):
      reads = [n for n, field in known.items() if field.of_task]
      raise LoraxError(
        f"{name} is of no use to the task {task}: {unknown('setting', name, reads)}"
      )
  return {name: values.get(name, field.default) for name, field in known.items()}


def settings(values: Values, overridden: Collection[str] = ()) -> Settings:
  """Settings of a config's values.

  Args:
    values: as `values` gives them.
    overridden: fields given on the command line, "train.steps". One of a duration's
      units takes the place of the others, that the config has.

  Raises:
    LoraxError: a value that can't be; what `complete` raises.
  """
  known = fields.known()
  chosen = {name: fields.fit(known[name], x) for name, x in complete(values).items()}
  for units in DURATIONS:
    names = {f"train.{unit}" for unit in units}
    if not names.isdisjoint(overridden):
      chosen |= dict.fromkeys(names.difference(overridden))
  return _build(Settings, (), chosen)


def _build(kind: Any, path: tuple[str, ...], values: Values) -> Any:
  types = fields.hints(kind)
  made = {}
  for each in dataclass_fields(kind):
    at, type_ = (*path, each.name), types[each.name]
    if at == ("data",):
      type_ = tasks.get(values["data.task"]).settings
    is_section = is_dataclass(type_)
    made[each.name] = (
      _build(type_, at, values) if is_section else values[fields.name_of(at)]
    )
  return kind(**made)


def convert(config: ConfigDict, overridden: Collection[str] = ()) -> Settings:
  """Settings of a config; see `values` and `settings`."""
  return settings(values(config), overridden)
