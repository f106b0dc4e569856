"""Changes of logits by settings, as transformers' logits processors make them.

Each function takes logits (or log probabilities) float32 (B, V) and the setting of each
row, and leaves a row alone whose setting is off. Source: transformers,
generation/logits_process.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lorax_flax.serve.history import History
from lorax_flax.serve.rules import Rules


def processed(
  logits_BxV: jax.Array,
  history: History,
  rules: Rules,
  new_B: jax.Array,
  eos_E: jax.Array,
) -> jax.Array:
  """Logits after what searches heed as well as sampling, in transformers' order.

  Args:
    logits_BxV: of the next token.
    history: what is before it.
    rules: settings of the rows.
    new_B: number of tokens that each row has got.
    eos_E: ids that end a text.
  """
  penalty_B, size_B = rules.repetition_penalty_B, rules.no_repeat_ngram_B
  logits_BxV = _where_any(
    penalty_B != 1, lambda x: repetition_penalty(x, history, penalty_B), logits_BxV
  )
  logits_BxV = _where_any(
    size_B > 0, lambda x: no_repeat_ngram(x, history, size_B), logits_BxV
  )
  return without_ends(logits_BxV, eos_E, new_B < rules.min_new_tokens_B)


def warped(logits_BxV: jax.Array, rules: Rules) -> jax.Array:
  """Logits to sample from, in transformers' order; rows of temperature 0 are junk."""
  t_B, k_B, rest_B, p_B = (
    rules.temperature_B,
    rules.top_k_B,
    rules.rest_B,
    rules.min_p_B,
  )
  logits_BxV = logits_BxV / jnp.where(t_B > 0, t_B, 1.0)[:, None]
  logits_BxV = _where_any(k_B > 0, lambda x: top_k(x, k_B), logits_BxV)
  logits_BxV = _where_any(rest_B > 0, lambda x: top_p(x, rest_B), logits_BxV)
  return _where_any(p_B > 0, lambda x: min_p(x, p_B), logits_BxV)


def _where_any(
  on_B: jax.Array, function: Callable[[jax.Array], jax.Array], logits_BxV: jax.Array
) -> jax.Array:
  """The function's result where any row has it on: most batches save its time."""
  return jax.lax.cond(on_B.any(), function, lambda x: x, logits_BxV)


def repetition_penalty(
  logits_BxV: jax.Array, history: History, penalty_B: jax.Array
) -> jax.Array:
  """Logits of tokens of the history, divided by the penalty or multiplied with it."""
  rows_Bx1 = jnp.arange(len(logits_BxV))[:, None]
  seen_BxV = jnp.zeros(logits_BxV.shape, bool)
  seen_BxV = seen_BxV.at[rows_Bx1, history.ids_BxN].max(history.valid_BxN, mode="drop")
  penalty_Bx1 = penalty_B[:, None]
  less_BxV = jnp.where(
    logits_BxV < 0, logits_BxV * penalty_Bx1, logits_BxV / penalty_Bx1
  )
  return jnp.where(seen_BxV, less_BxV, logits_BxV)


def no_repeat_ngram(
  logits_BxV: jax.Array, history: History, size_B: jax.Array
) -> jax.Array:
  """Logits without the tokens that would complete an n-gram of the history again."""
  ids_BxN, lengths_B = history.ids_BxN, history.lengths_B
  places_N = jnp.arange(ids_BxN.shape[1])

  # A token is forbidden where the size - 1 tokens before it are the row's last ones.
  def longer(k, same_BxN):
    before_BxN = jnp.roll(ids_BxN, k, axis=1)
    last_Bx1 = jnp.take_along_axis(ids_BxN, (lengths_B - k)[:, None], 1, mode="clip")
    equal_BxN = (before_BxN == last_Bx1) & (places_N >= k)[None, :]
    return same_BxN & (equal_BxN | (k >= size_B)[:, None])

  start_BxN = history.valid_BxN & (size_B > 0)[:, None]
  forbidden_BxN = jax.lax.fori_loop(1, size_B.max(), longer, start_BxN)
  rows_Bx1 = jnp.arange(len(logits_BxV))[:, None]
  forbidden_BxV = jnp.zeros(logits_BxV.shape, bool)
  forbidden_BxV = forbidden_BxV.at[rows_Bx1, ids_BxN].max(forbidden_BxN, mode="drop")
  return jnp.where(forbidden_BxV, -jnp.inf, logits_BxV)


def without_ends(
  logits_BxV: jax.Array, eos_E: jax.Array, mask_B: jax.Array
) -> jax.Array:
  """Logits without the ids that end a text, in the rows of the mask."""
  is_end_V = jnp.isin(jnp.arange(logits_BxV.shape[1]), eos_E)
  return jnp.where(is_end_V[None, :] & mask_B[:, None], -jnp.inf, logits_BxV)


def top_k(logits_BxV: jax.Array, k_B: jax.Array) -> jax.Array:
  """The k largest logits, and those that equal the least of them; the rest is -inf."""
  size = logits_BxV.shape[1]
  place_B = size - jnp.where(k_B > 0, jnp.minimum(k_B, size), size)
  least_Bx1 = jnp.take_along_axis(
    jnp.sort(logits_BxV, axis=1), place_B[:, None], axis=1
  )
  return jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)


def top_p(logits_BxV: jax.Array, rest_B: jax.Array) -> jax.Array:
  """Logits without the least probable tokens, of a total probability of at most rest.

  Of equal ones, those with the smaller ids go first; the most probable token stays.
  """
  order_BxV = jnp.argsort(logits_BxV, axis=1, stable=True)
  sorted_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=1)
  total_BxV = jnp.cumsum(jax.nn.softmax(sorted_BxV, axis=1), axis=1)
  out_BxV = (total_BxV <= rest_B[:, None]) & (rest_B > 0)[:, None]
  out_BxV = out_BxV.at[:, -1].set(False)
  rows_Bx1 = jnp.arange(len(logits_BxV))[:, None]
  out_BxV = jnp.zeros_like(out_BxV).at[rows_Bx1, order_BxV].set(out_BxV)
  return jnp.where(out_BxV, -jnp.inf, logits_BxV)


def min_p(logits_BxV: jax.Array, share_B: jax.Array) -> jax.Array:
  """Logits of tokens at least as probable as this share of the most probable one's."""
  probabilities_BxV = jax.nn.softmax(logits_BxV, axis=1)
  least_Bx1 = share_B[:, None] * probabilities_BxV.max(axis=1, keepdims=True)
  return jnp.where(probabilities_BxV < least_Bx1, -jnp.inf, logits_BxV)
