"""Rows of one cache that requests take and give back, each at a token of its own.

Shapes: B rows, N places of a row, V vocabulary.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.models.cache import Cache
from lorax_flax.models.registry import Outline
from lorax_flax.serve import rules, sampling
from lorax_flax.serve.history import History
from lorax_flax.serve.rules import Rules
from lorax_flax.serve.sampling import Carry, Tokens
from lorax_flax.serve.settings import Decoding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
  """Rows between two steps, with the settings of each."""

  carry: Carry
  rules: Rules


def blank(model: Outline, rows: int, length: int) -> Slots:
  """Rows that are all free, with places for `length` tokens each."""
  zero_B = lambda: jnp.zeros(rows, jnp.int32)  # An array each: they are donated.
  carry = Carry(
    state=model.blank_cache(rows, length),
    history=History(jnp.zeros((rows, length), jnp.int32), zero_B()),
    ids_B=zero_B(),
    new_B=zero_B(),
    done_B=jnp.ones(rows, bool),
  )
  return Slots(carry, rules.of([Decoding()] * rows, np.zeros(rows, np.int64)))


@jax.jit
def copied(slots: Slots, row: jax.Array, tokens: jax.Array) -> Cache:
  """A cache of one row with the first tokens of a row of the slots."""
  cache = slots.carry.state.take(row[None])
  return replace(cache, lengths_B=tokens[None])


@functools.partial(jax.jit, donate_argnames="slots")
def admit(
  slots: Slots,
  row: jax.Array,
  logits_1xV: jax.Array,
  cache: Cache,
  history: History,
  own: Rules,
  eos_E: jax.Array,
) -> tuple[Slots, Tokens]:
  """Puts a text into a row, and writes its first token.

  Args:
    slots: donated.
    row: int32 (), its number.
    logits_1xV: after the prompt.
    cache: of the prompt alone, at most as long as the rows.
    history: of the prompt, as long as the rows.
    own: settings of the text.
    eos_E: ids that end it.

  Returns:
    The slots, and the first token, of one row.
  """
  carry, tokens = sampling.first(
    logits_1xV, cache, history, own, eos_E, jnp.zeros(1, bool)
  )
  written = lambda x, new: x.at[row].set(new[0])
  rest = lambda c: (c.history, c.ids_B, c.new_B, c.done_B)
  put = Carry(
    slots.carry.state.put(row, carry.state),
    *jax.tree.map(written, rest(slots.carry), rest(carry)),
  )
  return Slots(put, jax.tree.map(written, slots.rules, own)), tokens
