"""Fields of a Hugging Face config.json: read into a config dataclass, and checked."""

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from lorax_flax.errors import LoraxError
from lorax_flax.models import ops

T = TypeVar("T")

# A damaged file is an error at once, and not a loop for hours.
MOST_LAYERS = 1000
_MOST = 2**31

# Fields that no family supports, with the value that turns them off.
_ONLY: Mapping[str, Any] = {"pruned_heads": {}, "quantization_config": None}


def read(
  kind: type[T],
  hf_config: Mapping[str, Any],
  *,
  defaults: Mapping[str, Any] | None = None,
  only: Mapping[str, Any] | None = None,
  aliases: Mapping[str, str] | None = None,
  **overrides: Any,
) -> T:
  """Makes a config of a config.json that is already parsed.

  Args:
    kind: a dataclass under Hugging Face's field names.
    hf_config: the JSON object. Fields without an effect on the numbers are ignored.
    defaults: of the family, for fields that config.json leaves out.
    only: further fields that change the numbers, with the one supported value.
    aliases: other names of fields that transformers accepts, to the field's.
    **overrides: fields that the caller decides (num_labels).

  Raises:
    LoraxError: an unsupported field, one of a wrong type, or a missing one.
  """
  _refuse(hf_config, {**_ONLY, **(only or {})})
  fields = dataclasses.fields(kind)  # type: ignore[arg-type]
  values = dict(defaults or {})
  # An explicit null means the default, except where null is a value of its own.
  given = {f.name: hf_config[f.name] for f in fields if _is_given(hf_config, f.name)}
  for alias, name in (aliases or {}).items():
    if not _is_given(hf_config, alias):
      continue
    if given.setdefault(name, hf_config[alias]) != hf_config[alias]:
      raise LoraxError(
        f"config: {alias}={hf_config[alias]!r} and {name}={given[name]!r} are two "
        "values of one field"
      )
  values |= given
  labels = labels_in(hf_config)
  if labels is not None and any(f.name == "num_labels" for f in fields):
    values["num_labels"] = labels
  values |= overrides
  required = [f.name for f in fields if f.default is dataclasses.MISSING]
  missing = [name for name in required if name not in values]
  if missing:
    raise LoraxError(f"config: missing {', '.join(missing)}")
  return kind(**values)


def _is_given(hf_config: Mapping[str, Any], name: str) -> bool:
  return hf_config.get(name) is not None


def _refuse(hf_config: Mapping[str, Any], only: Mapping[str, Any]) -> None:
  for name, value in only.items():
    found = hf_config.get(name, value)
    if found != value and found is not None:
      raise LoraxError(
        f"config: {name}={found!r} is not supported, only {value!r} is; this model "
        "would not compute what the checkpoint was trained for"
      )


def labels_in(hf_config: Mapping[str, Any]) -> int | None:
  """The number of labels in a config.json, by id2label or num_labels, or None."""
  names = hf_config.get("id2label")
  if names is None:
    return hf_config.get("num_labels")
  if not isinstance(names, Mapping):
    raise LoraxError(f"config: id2label must be an object, not {names!r}")
  return len(names)


def check(
  name: str, value: Any, kind: type, expected: str, good: Callable[[Any], Any]
) -> None:
  """Raises LoraxError unless `value` is a `kind` (ints pass for floats) and good.

  Args:
    expected: the values that are good, for the message.
  """
  kinds = (int, float) if kind is float else kind
  typed = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
  if typed and kind is float:
    typed = abs(value) <= sys.float_info.max  # NaN is not; an int has no largest
  if not typed or not good(value):
    raise LoraxError(f"config: {name} must be {expected}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule for a field's values, an annotation of the field: see `check`."""

  expected: str
  good: Callable[[Any], Any]


def at_least(least: int) -> Rule:
  """The rule of an integer from `least` on."""
  return Rule(f"an integer from {least} on", lambda x: least <= x < _MOST)


Layers = Annotated[
  int, Rule(f"from 1 to {MOST_LAYERS}", lambda x: 1 <= x <= MOST_LAYERS)
]
Size = Annotated[int, Rule("a positive integer", lambda x: 1 <= x < _MOST)]
Rate = Annotated[float, Rule("in [0, 1)", lambda x: 0 <= x < 1)]
Positive = Annotated[float, Rule("a positive number", lambda x: x > 0)]
Activation = Annotated[str, Rule("a name", lambda x: x and ops.activation(x))]
_Flag = Annotated[bool, Rule("true or false", lambda x: True)]


def check_fields(config: Any) -> None:
  """Checks the fields of a config that are annotated with a `Rule`, or bool.

  Raises:
    LoraxError: a field of another type or value.
  """
  for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
    value = getattr(config, name)
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else [hint]
    if value is None and len(options) > 1:
      continue
    annotated: Any = _Flag if options[0] is bool else options[0]
    for rule in getattr(annotated, "__metadata__", ()):
      check(name, value, annotated.__origin__, rule.expected, rule.good)


def check_token(config: Any, name: str) -> None:
  """Checks an id of the vocabulary."""
  check(
    name,
    getattr(config, name),
    int,
    f"a token id below vocab_size, {config.vocab_size}",
    lambda x: 0 <= x < config.vocab_size,
  )


def check_multiple(config: Any, name: str, of: str) -> None:
  """Checks that one field is a multiple of another."""
  if getattr(config, name) % getattr(config, of):
    raise LoraxError(
      f"config: {name} {getattr(config, name)} is not a multiple of {of} "
      f"{getattr(config, of)}"
    )
