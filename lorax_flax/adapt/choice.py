"""The weights that a config's targets mean, and those that it leaves out and why."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lorax_flax.adapt import targets as tg
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.interpret import roles as disc
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.errors import LoraxError, listing

CONTRACTIONS = {"conv_general_dilated", "dot_general", "ragged_product"}
Look = Callable[[Sequence[str]], disc.Discovery]


class Choice(NamedTuple):
  """The paths that are targets, and what was left out.

  Attributes:
    paths: in the order of the parameters.
    heads: the output heads that "all-linear" leaves out.
    left_out: path to why, for what the targets cover and what gets no delta.
  """

  paths: list[str]
  heads: tuple[str, ...] = ()
  left_out: Mapping[str, str] = {}


def choose(
  config: LoraConfig,
  look: Look,
  leaves: Mapping[str, Any],
  tuned: set[str],
  rows: set[str],
) -> Choice:
  """The weights that `config.targets` means.

  Args:
    look: discovers what the function does with these paths.
    leaves: the parameters by path, arrays or ShapeDtypeStructs.
    tuned: the paths that are trained in full; they are no targets.
    rows: the paths of which some rows are trained; "all-linear" leaves them to those.

  Raises:
    LoraxError: a pattern that matches nothing; no weight that is left.
  """
  floating = [p for p in leaves if jnp.issubdtype(leaves[p].dtype, jnp.floating)]
  exclude = config.exclude
  excluded = tg.select("exclude", exclude, floating, depth=2) if exclude else []
  if not config.targets:
    return Choice([])
  if config.targets == "all-linear":
    found = told_apart(look, floating)
    choice = _all_linear(found, leaves, tuned | rows)
  elif isinstance(config.targets, str):
    choice = Choice(tg.select("targets", config.targets, floating, depth=1))
  else:
    choice = _named(config.targets, look, leaves, floating)
  left = [p for p in choice.paths if p not in tuned and p not in excluded]
  if not left:
    raise LoraxError(
      f"every target is excluded or tuned: {listing(choice.paths)}. Nothing would be"
      " adapted"
    )
  why = {p: "excluded" for p in choice.paths if p in excluded and p not in tuned}
  return choice._replace(paths=left, left_out={**choice.left_out, **why})


def told_apart(look: Look, paths: Sequence[str]) -> disc.Discovery:
  """A discovery in which a product of two weights is one of a weight and data.

  Where one of the two has other uses, in which no delta can follow, it is data that
  flows into the other's product (learned tokens), and the other is the kernel.
  """
  usage: dict[str, disc.Usage] = {}
  while True:
    found = look(paths)
    data = {
      rival
      for path in paths
      for rivals in found.usage[path].rivals.values()
      for rival in rivals
      if found.usage[rival].refused and not found.usage[path].refused
    }
    usage |= found.usage
    if not data:
      found.usage = usage
      return found
    paths = [p for p in paths if p not in data]


def _all_linear(
  found: disc.Discovery, leaves: Mapping[str, Any], others: set[str]
) -> Choice:
  """Every weight that contractions alone consume, less the output heads."""
  why = {p: _why_not(found, p, leaves[p]) for p in leaves}
  chosen = [p for p in leaves if why[p] == ""]
  heads = tuple(p for p in leaves if why[p] == HEAD)
  left_out = {p: reason for p, reason in why.items() if reason and p not in others}
  if not chosen:
    reasons = "; ".join(f"{p}: {reason}" for p, reason in left_out.items())
    raise LoraxError(
      "targets='all-linear' found no weight that a contraction consumes"
      f" (output heads left out: {listing(heads) or 'none'})."
      f" Left out: {reasons or 'none'}. Parameters: {listing(leaves, 40)}"
    )
  return Choice(chosen, heads, left_out)


HEAD = "the output head"


def _why_not(found: disc.Discovery, path: str, leaf: Any) -> str | None:
  """The reason for which a leaf gets no delta; "" where it gets one.

  None of what no one would look for among the targets: scales, biases.
  """
  if len(leaf.shape) < 2:
    return None
  if path not in found.usage:
    return f"stored as {leaf.dtype}"
  usage = found.usage[path]
  if _no_kernel(usage, len(leaf.shape)):
    return None
  if usage.problems:
    primitive, why = next(iter(usage.problems.items()))
    return f"used by {primitive!r}, where a delta cannot follow: {why}"
  if not usage.sites:
    return "never used by the function"
  if other := usage.primitives - CONTRACTIONS:
    used = "looked up, as a table is" if "gather" in other else f"a {min(other)}"
    return f"{used}; name it to adapt it"
  try:
    known = {axis for _, site in usage.sites for axis in site}
    disc.roles(found, path, max(known, default=-1) + 1)
  except Unsupported as e:
    return str(e)
  return HEAD if path in found.heads else ""


def _named(
  suffixes: Sequence[str], look: Look, leaves: Mapping[str, Any], floating: list[str]
) -> Choice:
  """The kernels that a list of suffixes names, whether a delta can follow or not.

  Of a module, its scale or bias is not meant.
  """
  matrices = [p for p in floating if len(leaves[p].shape) > 1]
  hits = tg.select("targets", suffixes, floating, depth=2, listed=matrices)
  found = look(hits)
  why = {p: _no_kernel(found.usage[p], len(leaves[p].shape)) for p in hits}
  for suffix in suffixes:
    own = [p for p in hits if any(tg.ends_with(n, suffix) for n in tg.modules(p)[:2])]
    if all(map(why.get, own)):
      reasons = "; ".join(f"{p!r} is {why[p]}" for p in own[:4])
      raise LoraxError(f"targets: {suffix!r} names no kernel: {reasons}")
  named = [p for p in hits if why[p] and any(tg.ends_with(p, s) for s in suffixes)]
  return Choice([p for p in hits if not why[p]], (), {p: why[p] for p in named})


def _no_kernel(usage: disc.Usage, ndim: int) -> str:
  """The reason for which a weight is no kernel; "" of one that is, or is unused."""
  if usage.sites or usage.rivals:
    return ""
  if usage.added_to:
    return "a bias"
  num_axes = usage.num_axes if usage.refused else ndim
  return "" if num_axes > 1 else "a vector, and no low-rank delta fits"
