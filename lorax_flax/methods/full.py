"""A base leaf trained in full: a new head, a bias. PEFT's modules_to_save."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tuned:
  """Replaces the base leaf.

  Attributes:
    value: what the leaf is now, or these layers of it; trained.
    original: the base leaf, kept so that `unmerge` can put it back. It shares the
      base's buffer until the adapter is saved or moved.
    layers: where layers are stacked and some of them trained, their indices; None for
      all, or for a leaf that is no stack.
  """

  value: jax.Array
  original: jax.Array
  layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})

  trained: ClassVar[tuple[str, ...]] = ("value",)

  def put(self, leaf: Any) -> Any:
    """The base's leaf with the value in its place."""
    if self.layers is None:
      return self.value
    whole = leaf.astype(self.value.dtype)
    return whole.at[jnp.asarray(self.layers)].set(self.value)


def init(leaf: jax.Array, layers: tuple[int, ...] | None = None) -> Tuned:
  """The starting delta, which changes nothing; its value is a copy."""
  chosen = leaf if layers is None else leaf[jnp.asarray(layers)]
  return Tuned(jnp.array(chosen, copy=True), leaf, layers)
