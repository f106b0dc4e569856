"""Patterns matched against paths: the leaves with a delta, those trained in full."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.errors import LoraxError, listing, nearest

T = TypeVar("T")
Patterns = str | Sequence[str]


def as_list(patterns: Patterns) -> list[str]:
  return [patterns] if isinstance(patterns, str) else list(patterns)


def modules(path: str) -> list[str]:
  """The path and every module above it: "a/b/c" gives "a/b/c", "a/b", "a"."""
  parts = path.split("/")
  return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _hits(pattern: str, is_regex: bool, names: Sequence[str]) -> bool:
  if is_regex:
    return any(re.fullmatch(pattern, name) for name in names)
  return any(ends_with(name, pattern) for name in names)


def ends_with(name: str, suffix: str) -> bool:
  """True where a suffix of full names is the end of a path, "query/kernel"."""
  return name == suffix or name.endswith("/" + suffix)


def select(
  what: str,
  patterns: Patterns,
  paths: Sequence[str],
  *,
  depth: int | None,
  listed: Sequence[str] | None = None,
) -> list[str]:
  """The paths that any pattern matches, in the order of `paths`.

  Args:
    what: the option's name, for the message.
    patterns: a regular expression for whole names, or suffixes.
    paths: what there is.
    depth: number of names of a path count: 1 the path, 2 also its module's, None also
      all that hold it.
    listed: what the message offers, of `paths`; None for all.

  Raises:
    LoraxError: a pattern matches nothing.
  """
  is_regex = isinstance(patterns, str)
  chosen = set()
  for pattern in as_list(patterns):
    hits = [p for p in paths if _hits(pattern, is_regex, modules(p)[:depth])]
    if not hits:
      listed = paths if listed is None else listed
      ends = {name for p in listed for name in modules(p)[:2]}
      ends |= {"/".join(name.split("/")[-2:]) for name in ends}
      near = nearest(re.sub(r"[^\w/]+", "", pattern), ends)
      hint = f" Nearest: {', '.join(near)}." if near else ""
      raise LoraxError(
        f"{what}: {pattern!r} matches nothing.{hint} There are: {listing(listed, 40)}"
      )
    chosen |= set(hits)
  return [p for p in paths if p in chosen]


def first_match(table: Mapping[str, T], path: str, default: T) -> T:
  """PEFT's rule: the first key that matches the path, or its module's, to the end."""
  for pattern, value in table.items():
    for name in modules(path)[:2]:
      if re.match(rf"(.*/)?({pattern})$", name):
        return value
  return default


def check_patterns_used(what: str, table: Mapping[str, object], paths: Sequence[str]):
  """Every key of a rank or alpha pattern must match a target."""
  for pattern in table:
    if not any(first_match({pattern: True}, p, False) for p in paths):
      raise LoraxError(
        f"{what}: {pattern!r} matches no target. Targets: {listing(paths, 40)}"
      )


def layer_of(path: str, pattern: str | None) -> int | None:
  """The number of a path's layer, None where it names none."""
  hit = re.search(pattern or r"(?:^|[/_.])(\d+)(?=[/_.]|$)", path)
  return int(hit.group(1)) if hit else None


def biases_of(
  path: str, paths: Sequence[str], added_to: Mapping[str, Collection[str]]
) -> list[str]:
  """The base's biases of a kernel: "bias" beside it, or else what its product gets.

  Args:
    added_to: each path to the kernels to whose products' results it is added.
  """
  beside = "/".join([*path.split("/")[:-1], "bias"])
  return [beside] if beside in paths else [p for p in paths if path in added_to[p]]


def biases(
  config: LoraConfig,
  paths: Sequence[str],
  targets: Sequence[str],
  added_to: Mapping[str, Collection[str]],
) -> list[str]:
  """The biases that are trained: none, all, or those of a target's product.

  All are those that are called so (a norm's as well), and what a product's result gets.
  """
  if config.bias == "none":
    return []
  if config.bias == "lora_only":
    found = {b for t in targets for b in biases_of(t, paths, added_to)}
  else:
    found = {p for p in paths if p.split("/")[-1] == "bias" or added_to[p]}
  if not found:
    raise LoraxError(
      f"bias={config.bias!r}: there is no such bias among the parameters: none is added"
      f" to the result of a product. There are: {listing(paths, 40)}"
    )
  return [p for p in paths if p in found]
