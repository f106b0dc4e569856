"""Greedy decoding is transformers'; samples follow their distribution and the seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from lorax_flax.serve import history, rules, sampling
from lorax_flax.serve.settings import Decoding
from tests.serve.models import left_padded, table_step

PROMPTS = [[5, 9, 7, 30, 12], [8], [21, 4, 21], [6, 6]]
PAD = 39


def _texts(step, params, logits, state, prompts, settings, eos=(), numbers=None):
  """New tokens of each row, all of them sampled together."""
  count = len(prompts)
  room = max(map(len, prompts)) + max(d.max_new_tokens for d in settings)
  numbers = np.arange(count) if numbers is None else np.asarray(numbers)
  found = sampling.tokens(
    step,
    params,
    logits,
    state,
    history.of(prompts, room),
    rules.of(settings, numbers),
    eos=eos,
    stopped=lambda: np.zeros(count, bool),
  )
  ids_BxT = np.stack([tokens.ids_B for _, tokens in found], axis=1)
  rows = [row[row >= 0].tolist() for row in ids_BxT]
  # A row that has ended has no further tokens.
  assert all((row >= 0).sum() == len(r) for row, r in zip(ids_BxT, rows, strict=True))
  return rows


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 3, "repetition_penalty": 0.8, "min_new_tokens": 5},
  ],
  ids=" ".join,
)
def test_greedy_texts_are_transformers(pair, fields):
  model, decoder = pair
  settings = Decoding(max_new_tokens=12, **fields)
  ids, mask = left_padded(PROMPTS, PAD)
  for eos in ((), (6, 17, 25)):
    if not eos and settings.min_new_tokens:
      continue
    with torch.no_grad():
      peer = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=settings.min_new_tokens or None,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram,
        eos_token_id=list(eos) or None,
        pad_token_id=PAD,
      )[:, ids.shape[1] :].tolist()
    logits, state = decoder.start(PROMPTS, 17)
    each = [settings] * len(PROMPTS)
    params = decoder.loaded.params
    ours = _texts(decoder.step, params, logits, state, PROMPTS, each, eos)
    width = max(map(len, ours))
    assert [row + [PAD] * (width - len(row)) for row in ours] == peer


TABLE = jnp.asarray(np.random.default_rng(3).normal(size=(8, 8)) * 0.8, jnp.float32)


def _of_table(settings, count, numbers=None, eos=(), first=1):
  logits = jnp.broadcast_to(TABLE[first], (count, 8))
  settings = settings if isinstance(settings, list) else [settings] * count
  state = jnp.zeros(count, jnp.int32)
  return _texts(
    table_step, TABLE, logits, state, [[first]] * count, settings, eos, numbers
  )


@pytest.mark.parametrize(
  "fields",
  [{"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 5}],
  ids=str,
)
def test_samples_are_distributed_as_the_softmax_says(fields):
  texts = np.array(_of_table(Decoding(max_new_tokens=3, seed=1, **fields), 3000))
  logits = np.asarray(TABLE, np.float64) / fields["temperature"]
  if k := fields.get("top_k"):
    logits[logits < np.sort(logits, axis=1)[:, [-k]]] = -np.inf
  chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  # Of the first token, and of the third after each possible second one.
  for before, found in [(1, texts[:, 0])] + [
    (token, texts[texts[:, 1] == token, 2]) for token in range(8)
  ]:
    expected = chances[before] * len(found)
    counts = np.bincount(found, minlength=8)
    assert not counts[expected == 0].any()
    if len(found) > 200:
      possible = expected > 0
      test = stats.chisquare(counts[possible], expected[possible])
      assert test.pvalue > 1e-3
  # Rows are independent of each other, and a row's tokens of each other.
  pairs = np.stack([texts[:-1, 0], texts[1:, 0]], axis=1)
  same = (pairs[:, 0] == pairs[:, 1]).mean()
  assert abs(same - (chances[1] ** 2).sum()) < 0.04


def test_a_text_follows_from_its_seed_and_number_whatever_the_batch():
  settings = Decoding(max_new_tokens=8, temperature=1.0, seed=7)
  texts = _of_table(settings, 6)
  assert len({tuple(text) for text in texts}) == 6
  assert _of_table(settings, 6) == texts
  assert _of_table(settings, 2, numbers=[4, 1]) == [texts[4], texts[1]]
  other = Decoding(max_new_tokens=8, temperature=1.0, seed=8)
  assert not any(a == b for a, b in zip(_of_table(other, 6), texts, strict=True))
  mixed = [Decoding(max_new_tokens=8), settings, Decoding(max_new_tokens=3)]
  greedy, sampled, short = _of_table(mixed, 3)
  assert sampled == texts[1]
  assert greedy[:3] == short
  best = np.asarray(TABLE).argmax(axis=1).tolist()
  assert greedy == [best[token] for token in [1, *greedy[:-1]]]


def test_rows_end_at_their_ends_and_are_fed_no_more():
  fed = []

  def step(params, ids_B, state):
    jax.debug.callback(lambda ids: fed.append(ids.tolist()), ids_B)
    return table_step(params, jnp.maximum(ids_B, 0), state)

  settings = [Decoding(max_new_tokens=n) for n in (2, 30)]
  logits = jnp.asarray(np.eye(8, dtype=np.float32)[[1, 2]])
  table = jnp.asarray(np.eye(8, dtype=np.float32)[[1, 2, 3, 4, 5, 6, 7, 0]])
  state = jnp.zeros(2, jnp.int32)
  texts = _texts(step, table, logits, state, [[0], [0]], settings, eos=(6,))
  jax.effects_barrier()
  assert texts == [[1, 2], [2, 3, 4, 5, 6]]
  # The step that runs while the host reads the last tokens is one too many.
  assert sorted(fed) == [[-1, -1], [-1, 3], [-1, 4], [-1, 5], [1, 2]]


def test_logits_that_are_no_numbers_are_reported_of_rows_that_go_on():
  logits = jnp.asarray([[0.0, np.nan], [0.0, 1.0]], jnp.float32)
  found = sampling.tokens(
    table_step,
    jnp.full((2, 2), jnp.nan),
    logits,
    jnp.zeros(2, jnp.int32),
    history.of([[0], [0]], 4),
    rules.of([Decoding(max_new_tokens=3)] * 2, np.arange(2)),
    eos=(1,),
    stopped=lambda: np.zeros(2, bool),
  )
  assert [tokens.nan_B.tolist() for _, tokens in found][:1] == [[True, False]]
