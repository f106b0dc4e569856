"""Tokens of texts so far, in a buffer of a fixed shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class History:
  """Tokens of each row, prompt and new ones, without a gap.

  Attributes:
    ids_BxN: int32; what is behind a row's length has no meaning.
    lengths_B: int32.
  """

  ids_BxN: jax.Array
  lengths_B: jax.Array

  @property
  def valid_BxN(self) -> jax.Array:
    """True where there is a token."""
    return jnp.arange(self.ids_BxN.shape[1])[None, :] < self.lengths_B[:, None]

  def append(self, ids_B: jax.Array, mask_B: jax.Array) -> "History":
    """Rows with one more token each, where the mask is True and there is room."""
    rows_B = jnp.arange(len(ids_B))
    # A place behind the buffer's end is dropped.
    places_B = jnp.where(mask_B, self.lengths_B, self.ids_BxN.shape[1])
    ids_BxN = self.ids_BxN.at[rows_B, places_B].set(ids_B, mode="drop")
    return History(ids_BxN, self.lengths_B + mask_B.astype(jnp.int32))

  def take(self, rows_R: jax.Array) -> "History":
    """The rows with these numbers."""
    return History(self.ids_BxN[rows_R], self.lengths_B[rows_R])


def of(prompts: Sequence[Sequence[int] | np.ndarray], length: int) -> History:
  """A history of prompts, with room for `length` tokens."""
  ids_BxN = np.zeros((len(prompts), length), np.int32)
  for row, prompt in enumerate(prompts):
    ids_BxN[row, : len(prompt)] = prompt
  lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
  return History(jnp.asarray(ids_BxN), jnp.asarray(lengths_B))
