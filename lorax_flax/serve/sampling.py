"""Greedy decoding and sampling: one token of each row at a time."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.nodes import node
from lorax_flax.serve import steps, warping
from lorax_flax.serve.history import History
from lorax_flax.serve.rules import Rules
from lorax_flax.serve.steps import State, Step


@node
@dataclass(frozen=True)
class Carry:
  """State between two steps.

  Attributes:
    state: the model's, of all tokens but the last of each row.
    history: all tokens.
    ids_B: the last tokens, as of `Tokens`.
    new_B: number of new tokens.
    done_B: True for rows that have ended.
  """

  state: State
  history: History
  ids_B: jax.Array
  new_B: jax.Array
  done_B: jax.Array


class Tokens(NamedTuple):
  """The tokens of one step, numpy's where a host has them.

  Attributes:
    ids_B: int32; -1 for rows that had ended before.
    done_B: True for rows that have ended.
    nan_B: True for rows whose logits are not numbers.
  """

  ids_B: Any
  done_B: Any
  nan_B: Any


def tokens(
  step: Step,
  params: Any,
  logits_BxV: jax.Array,
  state: State,
  history: History,
  rules: Rules,
  *,
  eos: tuple[int, ...],
  stopped: Callable[[], np.ndarray],
) -> Iterator[tuple[Carry, Tokens]]:
  """Writes each row until it ends, has its number of tokens, or is stopped.

  Args:
    step: of the model, hashable: it is compiled once.
    params: what it takes first.
    logits_BxV: float32, of the tokens after the prompts.
    state: the model's after the prompts; it is donated.
    history: of the prompts, with room for the new tokens.
    rules: settings of the rows.
    eos: ids that end a row; they are its last token.
    stopped: tells before each step which rows are to end, bool (B,). It is asked while
      the step before runs, so that a row gets one more token then.

  Yields:
    The newest carry, which is donated as the iteration goes on, and the tokens of each
    step, until all rows have ended.
  """
  eos_E = jnp.asarray(eos, jnp.int32)
  begun = _first(logits_BxV, state, history, rules, eos_E, stopped())
  following = lambda carry: advance(step, params, carry, rules, eos_E, stopped())
  most = int(rules.max_new_tokens_B.max())
  yield from steps.run(begun, following, lambda seen: seen.done_B.all(), most)


def first(
  logits_BxV: jax.Array,
  state: State,
  history: History,
  rules: Rules,
  eos_E: jax.Array,
  stopped_B: jax.Array,
) -> tuple[Carry, Tokens]:
  """The first token of each row; arguments as of `tokens`."""
  zero_B = jnp.zeros(len(logits_BxV), jnp.int32)
  carry = Carry(state, history, zero_B, zero_B, stopped_B)
  return _pick(logits_BxV, carry, rules, eos_E)


_first = jax.jit(first, donate_argnames="state")


@functools.partial(jax.jit, static_argnums=0, donate_argnames="carry")
def advance(
  step: Step,
  params: Any,
  carry: Carry,
  rules: Rules,
  eos_E: jax.Array,
  stopped_B: jax.Array,
) -> tuple[Carry, Tokens]:
  """The next token of each row; the carry is donated, arguments as of `tokens`."""
  carry = replace(carry, done_B=carry.done_B | stopped_B)
  ids_B = jnp.where(carry.done_B, -1, carry.ids_B)
  logits_BxV, state = step(params, ids_B, carry.state)
  carry = replace(carry, state=state)
  return _pick(logits_BxV, carry, rules, eos_E)


def _pick(
  logits_BxV: jax.Array, carry: Carry, rules: Rules, eos_E: jax.Array
) -> tuple[Carry, Tokens]:
  """The next token of each row."""
  scores_BxV = warping.processed(logits_BxV, carry.history, rules, carry.new_B, eos_E)
  chosen_B = jax.lax.cond(
    (rules.temperature_B > 0).any(), _sampled, _greedy, scores_BxV, rules, carry.new_B
  )
  going_B = ~carry.done_B
  ids_B = jnp.where(going_B, chosen_B, -1)
  new_B = carry.new_B + going_B.astype(jnp.int32)
  is_last_B = jnp.isin(ids_B, eos_E) | (new_B >= rules.max_new_tokens_B)
  carry = Carry(
    state=carry.state,
    history=carry.history.append(ids_B, going_B),
    ids_B=ids_B,
    new_B=new_B,
    done_B=carry.done_B | is_last_B,
  )
  nan_B = jnp.isnan(logits_BxV.max(axis=1)) & going_B
  return carry, Tokens(ids_B, carry.done_B, nan_B)


def _greedy(scores_BxV: jax.Array, rules: Rules, new_B: jax.Array) -> jax.Array:
  del rules, new_B
  return jnp.argmax(scores_BxV, axis=1).astype(jnp.int32)


def _sampled(scores_BxV: jax.Array, rules: Rules, new_B: jax.Array) -> jax.Array:
  """Samples, of rows of temperature 0 the largest scores."""
  keys_B = jax.vmap(jax.random.fold_in)(rules.keys_B, new_B)
  draw = jax.vmap(jax.random.categorical)
  drawn_B = draw(keys_B, warping.warped(scores_BxV, rules)).astype(jnp.int32)
  greedy_B = _greedy(scores_BxV, rules, new_B)
  return jnp.where(rules.temperature_B > 0, drawn_B, greedy_B)
