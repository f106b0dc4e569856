"""The rank and the scale of each target: one for all, or one for each layer."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lorax_flax.adapt import targets as tg
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.errors import LoraxError


class Ranks(NamedTuple):
  """The values of a config's patterns for one target.

  Attributes:
    rank: of its factors, the largest of its layers'.
    alpha, scale: one for all layers, or one for each that is adapted.
    ranks: of each adapted layer, where they differ.
    layers: the indices on the leading stack axis that are adapted; None for all.
  """

  rank: int
  alpha: float | tuple[float, ...]
  scale: float | tuple[float, ...]
  ranks: tuple[int, ...] | None = None
  layers: tuple[int, ...] | None = None


def settle(
  config: LoraConfig, path: str, shape: tuple[int, ...], roles: tuple[str, ...]
) -> Ranks:
  """The rank and the scale of a target.

  Raises:
    LoraxError: a value for each layer where no layers are stacked, or another number.
  """
  rank = tg.first_match(config.rank_pattern, path, config.rank)
  alpha = tg.first_match(config.alpha_pattern, path, config.alpha)
  if not isinstance(rank, Sequence) and not isinstance(alpha, Sequence):
    return Ranks(rank, alpha, _scale(config, rank, alpha))
  if config.layers is not None:
    raise LoraxError(
      f"layers, and a value for each layer of {path!r}, do not go together: a rank of 0"
      " leaves a layer out"
    )
  ranks = _each("rank_pattern", rank, path, shape, roles)
  alphas = _each("alpha_pattern", alpha, path, shape, roles)
  return of_layers(config, ranks, alphas, range(len(ranks)), len(ranks))


def of_layers(
  config: LoraConfig,
  ranks: Sequence[int],
  alphas: Sequence[float],
  layers: Sequence[int],
  length: int,
) -> Ranks:
  """The ranks of stacked layers; those of rank 0 have no delta.

  Args:
    ranks, alphas, layers: of each layer, and its index on the stack axis.
    length: of that axis.
  """
  kept = [i for i, rank in enumerate(ranks) if rank]
  own = tuple(ranks[i] for i in kept)
  scales = tuple(_scale(config, ranks[i], alphas[i]) for i in kept)
  return Ranks(
    max(own),
    _same(tuple(alphas[i] for i in kept)),
    _same(scales),
    None if len(set(own)) == 1 else own,
    None if len(kept) == length else tuple(layers[i] for i in kept),
  )


def _scale(config: LoraConfig, rank: int, alpha: float) -> float:
  return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _same(values: tuple) -> Any:
  """The one value that all are, or all of them."""
  return values[0] if len(set(values)) == 1 else values


def _each(option: str, value: Any, path: str, shape, roles) -> tuple:
  if "stack" not in roles:
    raise LoraxError(f"{option}: {path!r} is one layer alone, and has one value")
  length = shape[roles.index("stack")]
  if not isinstance(value, Sequence):
    return (value,) * length
  if len(value) != length:
    raise LoraxError(
      f"{option}: {path!r} has {length} layers, and {len(value)} values are given"
    )
  return tuple(value)
