"""Models for the tests: a table of logits, and transformers' read by ours."""

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.serve import history
from lorax_flax.serve.history import History


def table_step(table_VxV, ids_B, state):
  """The logits after a token are its row of the table; the state counts steps."""
  return table_VxV[ids_B], state + 1


def take(state, rows_R):
  return state[rows_R]


class Recomputed:
  """A decoder that computes the full text anew at each step; its state is the text.

  Prompts are padded on the right, and so no position is another than in the text alone.
  """

  def __init__(self, loaded):
    self.loaded = loaded
    self._first = jax.jit(self.logits)

  def start(self, prompts, length):
    """Logits after prompts, and the state, with room for `length` tokens."""
    state = history.of(prompts, length)
    return self._first(self.loaded.params, state), state

  def logits(self, params, state):
    found_BxNxV = self.loaded.module.apply(
      {"params": params},
      input_ids=jnp.where(state.valid_BxN, state.ids_BxN, 0),
      attention_mask=state.valid_BxN.astype(jnp.int32),
      deterministic=True,
    )
    places_Bx1x1 = (state.lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(found_BxNxV, places_Bx1x1, axis=1)[:, 0]

  def step(self, params, ids_B, state):
    state = state.append(ids_B, jnp.ones(len(ids_B), bool))
    return self.logits(params, state), state

  @staticmethod
  def take(state, rows_R):
    return History.take(state, rows_R)


def left_padded(prompts, pad):
  """What transformers is given: ids and attention mask, padded on the left."""
  longest = max(map(len, prompts))
  ids = [[pad] * (longest - len(p)) + list(p) for p in prompts]
  mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
  return np.array(ids), np.array(mask)
