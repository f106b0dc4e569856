"""Rows of one cache that requests take and give back, each at a token of its own.

Shapes: B rows, R of them, N places of a row, V vocabulary.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.models.cache import Cache
from lorax_flax.models.registry import Outline
from lorax_flax.nodes import node
from lorax_flax.serve import rules, sampling
from lorax_flax.serve.history import History
from lorax_flax.serve.rules import Rules
from lorax_flax.serve.sampling import Carry, Tokens
from lorax_flax.serve.settings import Decoding
from lorax_flax.serve.steps import State, Step


@node
@dataclass(frozen=True)
class Slots:
  """Rows between two steps, with the settings of each."""

  carry: Carry
  rules: Rules


def sizes(rows: int) -> list[int]:
  """Numbers of rows that a step may have: an eighth of all, at least two, or all.

  The copy of a quarter of a cache takes as long as is saved. A single row is no size:
  XLA makes a slice of its gather, and then copies all rows to write beside it.
  """
  few = max(rows // 8, 2)
  return [few, rows] if few < rows else [rows]


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
  state = slots.carry.state.put(row, carry.state)
  put = _put(slots.carry, row[None], carry, state)
  written = lambda x, new: x.at[row].set(new[0])
  return Slots(put, jax.tree.map(written, slots.rules, own)), tokens


@functools.partial(jax.jit, static_argnums=0, donate_argnames="slots")
def advance(
  step: Step,
  params: Any,
  slots: Slots,
  rows_R: jax.Array,
  eos_E: jax.Array,
  stopped_R: jax.Array,
) -> tuple[Slots, Tokens]:
  """The next token of some rows, which are computed alone; the slots are donated.

  All others are left as they are. Where these are all, nothing is copied.

  Args:
    step: of the model.
    params: what it takes first, for these rows.
    rows_R: int32, their numbers, each once, in order.
    eos_E: ids that end a text.
    stopped_R: True for those that have ended.
  """
  if len(rows_R) == len(slots.carry.ids_B):
    carry, tokens = sampling.advance(
      step, params, slots.carry, slots.rules, eos_E, stopped_R
    )
    return Slots(carry, slots.rules), tokens
  taken = lambda x: x[rows_R]
  part = Carry(slots.carry.state.take(rows_R), *jax.tree.map(taken, _rest(slots.carry)))
  own = jax.tree.map(taken, slots.rules)
  carry, tokens = sampling.advance(step, params, part, own, eos_E, stopped_R)
  state = slots.carry.state.put_newest(rows_R, carry.state)
  return Slots(_put(slots.carry, rows_R, carry, state), slots.rules), tokens


def _rest(carry: Carry) -> tuple[Any, ...]:
  """The parts of a carry beside the model's state."""
  return carry.history, carry.ids_B, carry.new_B, carry.done_B


def _put(carry: Carry, rows_R: jax.Array, part: Carry, state: State) -> Carry:
  """A carry with that of some rows in their places, and this state."""
  written = lambda x, new: x.at[rows_R].set(new)
  return Carry(state, *jax.tree.map(written, _rest(carry), _rest(part)))
