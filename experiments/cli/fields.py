"""Config fields: names, types, defaults and help, read off the settings' dataclasses.

A field is declared once, in a frozen dataclass below `Settings`. The config, the flags
--config.NAME=VALUE, the fields that a sweep sets and --help are all made from it.
"""

import ast
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.jobs.settings import Settings
from lorax_flax.tasks import task as tasks

# Weights by name: a regular expression, "all-linear", or ends of paths.
PATTERNS: Any = str | Sequence[str]
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Field:
  """A field of the config.

  Attributes:
    name: "train.steps", as flags and sweeps name it.
    path: names from `Settings` down, ("train", "steps").
    type: annotation, `int | None`.
    default: value where the config has none; None where the dataclass has none either.
    help: text of the dataclass's docstring.
  """

  name: str
  path: tuple[str, ...]
  type: Any
  default: Any
  help: str

  @property
  def of_task(self) -> bool:
    """True for a field of the section data, whose fields and defaults are a task's."""
    return self.path[0] == "data"

  @property
  def optional(self) -> bool:
    """True where None is a value."""
    return type(None) in typing.get_args(self.type)

  @property
  def plain(self) -> Any:
    """The type without None."""
    kinds = [kind for kind in typing.get_args(self.type) if kind is not type(None)]
    return kinds[0] if self.optional and len(kinds) == 1 else self.type

  @property
  def entries(self) -> Any:
    """Type of a mapping's values; None for a field that is no mapping."""
    is_mapping = typing.get_origin(self.plain) is Mapping
    return typing.get_args(self.plain)[1] if is_mapping else None


def known() -> Mapping[str, Field]:
  """Every field, by name; those of every registered task."""
  return _known(tuple((name, task.settings) for name, task in tasks.TASKS.items()))


@functools.cache
def _known(rows: tuple[tuple[str, type], ...]) -> Mapping[str, Field]:
  found = {field.name: field for field in _below(Settings, ())}
  for task, kind in rows:
    for field in _below(kind, ("data",)):
      other = found.setdefault(field.name, field).type
      if field.type != other:
        raise LoraxError(
          f"the task {task} declares {field.name} as {spell(field.type)}, and another "
          f"task as {spell(other)}: one flag sets both"
        )
  return found


def declared(kind: type) -> Sequence[Field]:
  """The fields of a settings' dataclass."""
  return tuple(_below(kind, ()))


def of_task(name: str) -> Mapping[str, Field]:
  """The fields of a run of a task, by name; LoraxError where there is no such task."""
  rest = {n: field for n, field in known().items() if not field.of_task}
  kind = tasks.get(name).settings
  return rest | {field.name: field for field in _below(kind, ("data",))}


def _below(kind: Any, path: tuple[str, ...]) -> Iterator[Field]:
  types_ = hints(kind)
  helps = {n: text for base in kind.__mro__[::-1] for n, text in _attributes(base)}
  for each in dataclasses.fields(kind):
    at, type_ = (*path, each.name), types_[each.name]
    if dataclasses.is_dataclass(type_):
      yield from _below(type_, at)
      continue
    default = None if each.default is dataclasses.MISSING else each.default
    if each.default_factory is not dataclasses.MISSING:
      default = each.default_factory()
    yield Field(name_of(at), at, type_, default, helps.get(each.name, ""))


def hints(kind: Any) -> dict[str, Any]:
  """Types of a dataclass's fields, where it is of a config's file, no module, too."""
  return typing.get_type_hints(kind, localns=kind.__init__.__globals__)


def name_of(path: tuple[str, ...]) -> str:
  """Name of the field with a path; the seed is the whole run's, not training's."""
  return "seed" if path == ("train", "seed") else ".".join(path)


def _attributes(kind: type) -> Iterator[tuple[str, str]]:
  """Help of each field, from the docstring's section `Attributes:`."""
  section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
  section = re.split(r"\n(?=\S)", section)[0]
  for entry in re.split(r"\n(?=  \w)", f"\n{section}"):
    names, colon, text = entry.partition(":")
    if colon:
      yield from ((n, " ".join(text.split())) for n in names.strip().split(", "))


def find(name: str) -> tuple[Field, str | None]:
  """The field of a name, and the key within it where it is a mapping.

  "lora.rank_pattern..*/query" is the entry ".*/query" of `lora.rank_pattern`.

  Raises:
    LoraxError: there is none, or it is a section; names the nearest.
  """
  fields = known()
  if name in fields:
    return fields[name], None
  for field in fields.values():
    if field.entries is not None and name.startswith(f"{field.name}."):
      return field, name.removeprefix(f"{field.name}.")
  inside = [field for field in fields if field.startswith(f"{name}.")]
  if inside:
    raise LoraxError(
      f"config.{name} is a section; give one of its fields: {listing(inside)}"
    )
  last = name.rpartition(".")[2]
  # "rank" for "lora.rank" is no misspelling that letters show.
  ends = [field for field in fields if field.rpartition(".")[2] == last]
  if ends:
    raise LoraxError(
      f"unknown config field {name!r}; did you mean {' or '.join(map(repr, ends))}?"
    )
  raise LoraxError(unknown("config field", name, fields))


def is_switch(name: str) -> bool:
  """True for a bool field, which has the flags --config.NAME and --noconfig.NAME."""
  return name in known() and known()[name].plain is bool


def parse(name: str, text: str) -> Any:
  """Value of a flag's text, by the type of the field or entry that it sets.

  Raises:
    LoraxError: no such field, or a text that is no value of it.
  """
  field, key = find(name)
  kind = field.plain if key is None else field.entries
  if kind is str:
    return None if text == "None" and field.optional else text
  value = _literal(text)
  if kind in (Any, bool):
    return _WORDS.get(text, value)
  if kind == Sequence[int] and isinstance(value, int):
    return (value,)
  return value


def _literal(text: str) -> Any:
  for read in (ast.literal_eval, float):
    try:
      return read(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      continue
  return text


def fit(field: Field, value: Any) -> Any:
  """A field's value in the field's type: an int as a float, a list as a tuple, ….

  Raises:
    LoraxError: it is of another type.
  """
  if field.type == PATTERNS:
    return patterns(value)
  if field.entries is not None and field.optional and not value:
    return None
  return _checked(field.name, field.type, value)


def fit_entry(field: Field, key: str, value: Any) -> Any:
  """Value of a mapping's entry in the mapping's type; see `fit`."""
  return _checked(f"{field.name}.{key}", field.entries, value)


def _checked(name: str, kind: Any, value: Any) -> Any:
  try:
    return _fit(kind, value)
  except TypeError as error:
    raise LoraxError(
      f"config.{name} can't be {value!r}: it takes {spell(kind)}"
    ) from error


def _fit(kind: Any, value: Any) -> Any:
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return value
  if origin is types.UnionType:
    for each in inner:
      try:
        return _fit(each, value)
      except TypeError:
        continue
  elif origin is Sequence and isinstance(value, list | tuple):
    return tuple(_fit(inner[0], each) for each in value)
  elif origin is Mapping and isinstance(value, Mapping):
    return {_fit(inner[0], key): _fit(inner[1], each) for key, each in value.items()}
  elif kind is float and type(value) in (int, float):
    return float(value)
  elif kind in (bool, int, str, type(None)) and type(value) is kind:
    return value
  raise TypeError(value)


def patterns(value: Any) -> str | tuple[str, ...]:
  """Names of weights as `LoraConfig` takes them.

  "all-linear" and regular expressions for full paths, ".*/(query|value)/kernel", stay
  as they are. Plain names, "query,value" or ("query", "value"), are ends of paths.

  Raises:
    LoraxError: neither a text nor texts.
  """
  if isinstance(value, str):
    plain = re.fullmatch(r"[\w/]+(,[\w/]+)*,?", value)
    return tuple(filter(None, value.split(","))) if plain else value
  if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
    return tuple(value)
  raise LoraxError(f"weights are named by a text or several, not {value!r}")


def spell(kind: Any) -> str:
  """A type for a message: "int or ints", "a mapping to float"."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return " or ".join(map(spell, inner))
  if origin is Sequence:
    return f"{spell(inner[0])}s"
  if origin is Mapping:
    return f"a mapping to {spell(inner[1])}"
  return {type(None): "None", Any: "any value"}.get(kind, getattr(kind, "__name__", ""))
