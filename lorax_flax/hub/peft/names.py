"""PEFT's rules for names of modules: ends after a dot, and patterns for ends."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorax_flax.errors import LoraxError


def shortest_ends(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
  """The shortest ends of names, after a dot, that name all `chosen` and no `others`."""
  taken = {end for name in others for end in _every_end(name)}
  found = []
  for name in chosen:
    end = next((end for end in _every_end(name) if end not in taken), None)
    if end is None:
      raise LoraxError(f"no end of the module name {name!r} is its own")
    found.append(end)
  return list(dict.fromkeys(found))


def _every_end(name: str) -> list[str]:
  parts = name.split(".")
  return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def ends_with(name: str, end: str) -> bool:
  return name == end or name.endswith(f".{end}")


def looked_up(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", name):
      return value
  return default


def several(value: Any) -> tuple:
  """None, one, or several, as several."""
  if value is None:
    return ()
  return value if isinstance(value, tuple) else (value,)
