"""Beam search, token for token transformers' `generate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lorax_flax.errors import LoraxError
from lorax_flax.serve import beams, history, rules
from lorax_flax.serve.settings import Decoding
from tests.serve.models import Recomputed, left_padded, table_step, take

RNG = np.random.default_rng(0)
# No token of a prompt; not 0, for which transformers puts an end.
PAD = 39
PROMPTS = [RNG.integers(3, PAD, n).tolist() for n in (5, 2, 7, 1)]
LIMIT = 9


def _peer(model, settings, eos):
  ids, mask = left_padded(PROMPTS, PAD)
  with torch.no_grad():
    found = model.generate(
      input_ids=torch.tensor(ids),
      attention_mask=torch.tensor(mask),
      do_sample=False,
      max_new_tokens=settings.max_new_tokens,
      min_new_tokens=settings.min_new_tokens or None,
      num_beams=settings.beams,
      length_penalty=settings.length_penalty,
      early_stopping=settings.early_stopping,
      no_repeat_ngram_size=settings.no_repeat_ngram,
      repetition_penalty=settings.repetition_penalty,
      eos_token_id=list(eos) or None,
      pad_token_id=PAD,
    )
  return [row[ids.shape[1] :] for row in found.tolist()]


def _ours(decoder: Recomputed, settings, eos, real_B=None):
  count = len(PROMPTS)
  length = max(map(len, PROMPTS)) + settings.max_new_tokens
  logits, state = decoder.start(PROMPTS, length)
  found, nan_B = beams.search(
    decoder.step,
    decoder.take,
    decoder.loaded.params,
    logits,
    state,
    history.of(PROMPTS, length),
    rules.of([settings] * count, np.arange(count)),
    settings,
    eos=eos,
    real_B=np.ones(count, bool) if real_B is None else real_B,
  )
  assert not nan_B.any()
  ids, lengths = np.asarray(found.ids_BxN), np.asarray(found.lengths_B)
  return [
    ids[i, len(p) : n].tolist()
    for i, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))
  ]


def _padded(row, length):
  return row + [PAD] * (length - len(row))


SETTINGS = [
  {"early_stopping": False},
  {"early_stopping": True},
  {"early_stopping": "never"},
  {"early_stopping": False, "length_penalty": 2.5},
  {"early_stopping": True, "length_penalty": -1.0},
  {"early_stopping": "never", "length_penalty": 0.0},
  {"early_stopping": "never", "length_penalty": -0.5},
  {"no_repeat_ngram": 2},
  {"repetition_penalty": 1.5, "early_stopping": True},
  {"min_new_tokens": 6, "no_repeat_ngram": 3},
]


def _likely(model, count):
  """Ids that beams write often, so that these end early."""
  free = Decoding(max_new_tokens=LIMIT, beams=4)
  ids = np.concatenate(_peer(model, free, ()))
  common = np.argsort(-np.bincount(ids))
  return tuple(int(i) for i in common[1 : 1 + count])


@pytest.mark.parametrize(("count", "ends"), [(2, 1), (3, 4), (3, 0)])
def test_beams_are_transformers_token_for_token(pair, count, ends):
  model, decoder = pair
  eos = _likely(model, ends)
  early = 0
  for fields in SETTINGS:
    if not eos and "min_new_tokens" in fields:
      continue
    settings = Decoding(max_new_tokens=LIMIT, beams=count, **fields)
    ours, peer = _ours(decoder, settings, eos), _peer(model, settings, eos)
    longest = max(map(len, ours))
    assert [_padded(row, longest) for row in ours] == peer, settings
    early += sum(len(row) < LIMIT for row in ours)
  # What is compared are searches that end early, and some that don't.
  assert (0 < early < len(SETTINGS) * len(PROMPTS)) == bool(eos)


def test_rows_that_fill_up_a_batch_are_not_searched(pair):
  _, decoder = pair
  settings = Decoding(max_new_tokens=LIMIT, beams=3)
  alone = _ours(decoder, settings, ())
  found = _ours(decoder, settings, (), real_B=np.array([True, False, True, True]))
  assert found == [alone[0], [], *alone[2:]]


def test_a_search_ends_once_no_row_can_change():
  # After 1 comes 2, which ends a text, after which comes 3 at any length.
  table = np.full((6, 6), -9.0, np.float32)
  table[[0, 1, 2, 3, 4, 5], [1, 2, 3, 3, 2, 2]] = 0
  steps = []

  def step(params, ids_B, state):
    jax.debug.callback(lambda: steps.append(1))
    return table_step(params, ids_B, state)

  settings = Decoding(max_new_tokens=50, beams=2, early_stopping=True)
  found, _ = beams.search(
    step,
    take,
    jnp.asarray(table),
    jnp.asarray(table[[1]]),
    jnp.zeros(1, jnp.int32),
    history.of([[1]], 60),
    rules.of([settings], np.arange(1)),
    settings,
    eos=(2,),
    real_B=np.ones(1, bool),
  )
  assert found.ids_BxN[0, : found.lengths_B[0]].tolist() == [1, 2]
  jax.effects_barrier()
  assert len(steps) < 5


def test_more_beams_than_candidates_are_refused():
  settings = Decoding(beams=2)
  arguments = (table_step, take, None, jnp.zeros((1, 3)), None, None)
  with pytest.raises(LoraxError, match=r"beams=2: a vocabulary of 3 tokens"):
    beams.search(
      *arguments,
      rules.of([settings], np.arange(1)),
      settings,
      eos=(0, 1, 2),
      real_B=np.ones(1, bool),
    )
