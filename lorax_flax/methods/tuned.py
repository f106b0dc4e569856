"""A base leaf trained in full: a new head, a bias. PEFT's modules_to_save."""

from dataclasses import dataclass
from typing import ClassVar

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tuned:
  """Replaces the base leaf.

  Attributes:
    value: what the leaf is now; trained.
    original: the base leaf, kept so that `unmerge` can put it back. It shares the
      base's buffer until the adapter is saved or moved.
  """

  value: jax.Array
  original: jax.Array

  trained: ClassVar[tuple[str, ...]] = ("value",)
