"""Beam search, token for token transformers' (`_beam_search` of 5.24)."""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.nodes import node
from lorax_flax.serve import steps, warping
from lorax_flax.serve.history import History
from lorax_flax.serve.rules import Rules
from lorax_flax.serve.settings import Decoding
from lorax_flax.serve.steps import State, Step, Take

# What is taken off the score of a beam that is not to be chosen.
_OUT = -1.0e9


@node
@dataclass(frozen=True)
class _Beams:
  """Beams of B rows, K of each; running and finished ones.

  Attributes:
    state: the model's, of B·K rows, before `rows_R` are taken.
    rows_R: number of the row of the state that each running beam goes on from.
    history: tokens of running beams, B·K rows.
    scores_BxK: sums of their log probabilities.
    finished: tokens of finished beams, the best first, B·K rows.
    finished_scores_BxK: theirs, with the length penalty.
    is_finished_BxK: False for a place that no beam has taken.
    open_B: True for rows whose finished beams may still change.
    new: number of new tokens of a running beam.
  """

  state: State
  rows_R: jax.Array
  history: History
  scores_BxK: jax.Array
  finished: History
  finished_scores_BxK: jax.Array
  is_finished_BxK: jax.Array
  open_B: jax.Array
  new: jax.Array


@node
@dataclass(frozen=True)
class _Search:
  """Settings of a search as arrays.

  Attributes:
    rules: settings of the B·K rows.
    eos_E: ids that end a beam.
    lengths_T: what the score of a beam of T tokens is divided by.
    hoped_T: what the best running beam's is divided by, where it is of T tokens.
    closes: True where a row ends once it has K finished beams.
  """

  rules: Rules
  eos_E: jax.Array
  lengths_T: jax.Array
  hoped_T: jax.Array
  closes: jax.Array


class _Seen(NamedTuple):
  open_B: Any
  nan_B: Any


def search(
  step: Step,
  take: Take,
  params: Any,
  logits_BxV: jax.Array,
  state: State,
  history: History,
  rules: Rules,
  decoding: Decoding,
  *,
  eos: tuple[int, ...],
  real_B: np.ndarray,
) -> tuple[History, np.ndarray]:
  """The best beam of each row.

  Args:
    step: of the model, hashable.
    take: rows of the model's state.
    params: what `step` takes first.
    logits_BxV: float32, of the tokens after the prompts.
    state: the model's after the prompts, B rows.
    history: of the prompts, with room for the new tokens.
    rules: settings of the rows, all of `decoding`.
    decoding: beams, length penalty and early stopping.
    eos: ids that end a beam; they are its last token.
    real_B: False for rows that fill up the batch, which are not searched.

  Returns:
    The tokens of each row, with its prompt; and bool (B,), True for rows whose logits
    were not numbers.

  Raises:
    LoraxError: more beams than the vocabulary has candidates for.
  """
  count, size = decoding.beams, logits_BxV.shape[1]
  if _kept(count, len(eos)) > count * size:
    raise LoraxError(f"beams={count}: a vocabulary of {size} tokens is too small")
  rows_R = jnp.repeat(jnp.arange(len(logits_BxV)), count)
  settings = _settings(jax.tree.map(lambda x: x[rows_R], rules), decoding, eos)
  first = _first(take, count, logits_BxV, state, history, settings, real_B)
  advance = lambda beams: _next(step, take, params, beams, settings)
  ended = lambda seen: not seen.open_B.any()
  nan_B = np.zeros(len(logits_BxV), bool)
  beams = first[0]
  for newest, seen in steps.run(first, advance, ended, decoding.max_new_tokens):
    beams, nan_B = newest, nan_B | seen.nan_B
  best_B = jnp.arange(len(logits_BxV)) * count
  return beams.finished.take(best_B), nan_B


def _settings(rules: Rules, decoding: Decoding, eos: tuple[int, ...]) -> _Search:
  penalty = decoding.length_penalty
  # Powers in double precision, as Python's; no score is of 0 tokens.
  lengths_T = np.arange(decoding.max_new_tokens + 2, dtype=np.float64)
  lengths_T[0] = 1
  scale_T = lengths_T**penalty
  hopeful = decoding.early_stopping == "never" and penalty > 0
  hoped_T = np.full_like(scale_T, scale_T[-2]) if hopeful else scale_T
  return _Search(
    rules=rules,
    eos_E=jnp.asarray(eos, jnp.int32),
    lengths_T=jnp.asarray(scale_T, jnp.float32),
    hoped_T=jnp.asarray(hoped_T, jnp.float32),
    closes=jnp.asarray(decoding.early_stopping is True),
  )


def _kept(beams: int, ends: int) -> int:
  """Number of candidates of a row: enough to go on with if K of them end."""
  return max(2, 1 + ends) * beams


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first(take, count, logits_BxV, state, history, settings, real_B):
  batch = len(logits_BxV)
  rows_R = jnp.repeat(jnp.arange(batch), count)
  # All beams of a row are equal as yet: candidates come of the first alone.
  scores_K = jnp.where(jnp.arange(count) > 0, _OUT, 0.0).astype(jnp.float32)
  beams = _Beams(
    state=take(state, rows_R),
    rows_R=rows_R,
    history=history.take(rows_R),
    scores_BxK=jnp.broadcast_to(scores_K[None], (batch, count)),
    finished=history.take(rows_R),
    finished_scores_BxK=jnp.full((batch, count), _OUT, jnp.float32),
    is_finished_BxK=jnp.zeros((batch, count), bool),
    open_B=jnp.asarray(real_B),
    new=jnp.zeros((), jnp.int32),
  )
  return _pick(logits_BxV[rows_R], beams, settings)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="beams")
def _next(step, take, params, beams, settings):
  ids_R = jnp.take_along_axis(
    beams.history.ids_BxN, beams.history.lengths_B[:, None] - 1, axis=1
  )[:, 0]
  logits_RxV, state = step(params, ids_R, take(beams.state, beams.rows_R))
  return _pick(logits_RxV, replace(beams, state=state), settings)


def _pick(
  logits_RxV: jax.Array, beams: _Beams, settings: _Search
) -> tuple[_Beams, _Seen]:
  """The next token of each beam; those that end are finished if they score enough."""
  batch, count = beams.scores_BxK.shape
  new_R = jnp.full(batch * count, beams.new)
  logprobs_RxV = warping.processed(
    jax.nn.log_softmax(logits_RxV, axis=1),
    beams.history,
    settings.rules,
    new_R,
    settings.eos_E,
  )
  logprobs_BxKxV = logprobs_RxV.reshape(batch, count, -1) + beams.scores_BxK[..., None]
  scores_BxM, flat_BxM = jax.lax.top_k(
    logprobs_BxKxV.reshape(batch, -1), _kept(count, len(settings.eos_E))
  )
  beam_BxM, ids_BxM = jnp.divmod(flat_BxM, logprobs_BxKxV.shape[2])
  from_BxM = jnp.arange(batch)[:, None] * count + beam_BxM
  candidates = beams.history.take(from_BxM.reshape(-1))
  candidates = candidates.append(ids_BxM.reshape(-1), jnp.ones(from_BxM.size, bool))

  new = beams.new + 1
  is_full_B = new >= settings.rules.max_new_tokens_B[::count]
  ends_BxM = jnp.isin(ids_BxM, settings.eos_E) | is_full_B[:, None]
  masked_BxM = scores_BxM + ends_BxM.astype(jnp.float32) * _OUT
  scores_BxK, place_BxK = jax.lax.top_k(masked_BxM, count)

  # Of those that end only the best K are finished; the others are there to go on from.
  finishes_BxM = ends_BxM & (jnp.arange(from_BxM.shape[1]) < count)[None, :]
  refused_BxM = ~finishes_BxM | ~beams.open_B[:, None]
  final_BxM = scores_BxM / settings.lengths_T[new]
  final_BxM = final_BxM + refused_BxM.astype(jnp.float32) * _OUT
  merged = lambda old, fresh: jnp.concatenate([old, fresh], axis=1)
  finished_scores_BxK, best_BxK = jax.lax.top_k(
    merged(beams.finished_scores_BxK, final_BxM), count
  )
  is_finished_BxK = jnp.take_along_axis(
    merged(beams.is_finished_BxK, finishes_BxM), best_BxK, axis=1
  )

  hoped_Bx1 = scores_BxK[:, :1] / settings.hoped_T[new]
  worst_Bx1 = finished_scores_BxK.min(axis=1, keepdims=True)
  worst_BxK = jnp.where(is_finished_BxK, worst_Bx1, _OUT)
  open_B = beams.open_B & (hoped_Bx1 > worst_BxK).any(axis=1) & ~is_full_B
  open_B = open_B & ~(settings.closes & is_finished_BxK.all(axis=1))
  following = _Beams(
    state=beams.state,
    rows_R=jnp.take_along_axis(from_BxM, place_BxK, axis=1).reshape(-1),
    history=_chosen(candidates, place_BxK, ends_BxM.shape[1]),
    scores_BxK=scores_BxK,
    finished=_chosen(
      _joined(beams.finished, candidates, batch), best_BxK, count + ends_BxM.shape[1]
    ),
    finished_scores_BxK=finished_scores_BxK,
    is_finished_BxK=is_finished_BxK,
    open_B=open_B,
    new=new,
  )
  nan_B = jnp.isnan(logits_RxV.max(axis=1)).reshape(batch, count).any(axis=1)
  return following, _Seen(open_B, nan_B & beams.open_B)


def _chosen(history: History, places_BxK: jax.Array, per_row: int) -> History:
  """Histories at these places, of the `per_row` that each row has."""
  offsets_Bx1 = jnp.arange(len(places_BxK))[:, None] * per_row
  return history.take((offsets_Bx1 + places_BxK).reshape(-1))


def _joined(first: History, second: History, batch: int) -> History:
  """Each row's histories of the first, and then those of the second."""

  def join(a, b):
    split = lambda x: x.reshape(batch, -1, *x.shape[1:])
    both = jnp.concatenate([split(a), split(b)], axis=1)
    return both.reshape(-1, *both.shape[2:])

  return jax.tree.map(join, first, second)
