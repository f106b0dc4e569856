"""PEFT's rules for names of modules: suffixes after a dot, and patterns of these."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorax_flax.errors import LoraxError


def shortest_ends(names: Iterable[str], others: Iterable[str]) -> list[str]:
  """The shortest suffixes, after a dot, that match all `names` and no `others`."""
  taken = {end for other in others for end in _every_end(other)}
  found = []
  for name in names:
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
  """A tuple of None (empty), one value, or a tuple."""
  if value is None:
    return ()
  return value if isinstance(value, tuple) else (value,)
