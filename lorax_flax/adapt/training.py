"""Wishes of an adapter's methods for its training, beside gradients."""

from collections.abc import Mapping

import jax
import optax

from lorax_flax.methods import Adapter, Delta


def penalty(adapter: Adapter) -> jax.Array | float:
  """The term that is added to the loss: AdaLoRA's distance from orthonormal factors.

  Of most methods it is 0.
  """
  kinds: dict[type[Delta], list[Delta]] = {}
  for delta in adapter.values():
    kinds.setdefault(type(delta), []).append(delta)
  return sum(kind.penalty(deltas) for kind, deltas in kinds.items())


def size(adapter: Mapping[str, Delta]) -> int:
  """Number of trained parameters; what deltas have in common counts once."""
  sizes = {
    (type(d).__name__ if name in d.common else path, name): d.leaves()[name].size
    for path, d in adapter.items()
    for name in d.trained
  }
  return sum(sizes.values())


def scheduled(
  optimizer: optax.GradientTransformation, adapter: Adapter
) -> optax.GradientTransformation:
  """The optimiser of an adapter's trained leaves, with its methods' schedules.

  AdaLoRA's ranks fall by one; of most methods it is the optimiser itself.
  """
  kinds: dict[type[Delta], None] = {type(delta): None for delta in adapter.values()}
  for kind in kinds:
    optimizer = kind.scheduled(optimizer)
  return optimizer
