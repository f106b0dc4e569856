"""Flags of decoding, made from the fields of `Decoding`."""

from collections.abc import Callable
from typing import Any

from absl import flags

from experiments.cli import fields
from lorax_flax.serve.settings import Decoding

_EARLY = {"False": False, "True": True, "never": "never"}


def define(values: flags.FlagValues) -> Callable[[], Decoding]:
  """Defines a flag for each field; returns what reads them."""
  for field in fields.declared(Decoding):
    about = f"{field.help[:1].upper()}{field.help[1:]}"
    if field.name == "early_stopping":
      flags.DEFINE_enum(field.name, "False", list(_EARLY), about, flag_values=values)
    elif field.name == "stop":
      more = f"{about} May be given several times."
      flags.DEFINE_multi_string(field.name, [], more, flag_values=values)
    else:
      is_float = field.type is float
      make: Any = flags.DEFINE_float if is_float else flags.DEFINE_integer
      make(field.name, field.default, about, flag_values=values)

  def read() -> Decoding:
    names = [field.name for field in fields.declared(Decoding)]
    given: dict[str, Any] = {name: values[name].value for name in names}
    early, stop = _EARLY[given["early_stopping"]], tuple(given["stop"])
    return Decoding(**{**given, "early_stopping": early, "stop": stop})

  return read
