"""Logits after settings, compared with transformers' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lorax_flax.serve import history, rules, warping
from lorax_flax.serve.settings import Decoding

SHAPES = [(1, 1), (1, 7), (3, 33), (5, 1000)]
INF = float("inf")


def _logits(shape, seed=0):
  """Normal logits, with ties, and rows of few, and of no, tokens that are possible."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=shape).astype(np.float32) * 3
  if shape[0] > 2:
    logits[0] = np.round(logits[0])
    logits[1, 2:] = -INF
    logits[2] = 0
  return logits


def _prompts(shape, seed=0):
  """Ids of unequal lengths out of few, so that n-grams repeat; some the model lacks."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 30, shape[0])
  return [rng.integers(0, min(4, shape[1] + 1), n) for n in lengths]


def _same(ours, peer):
  """Equal but for the last bit: torch multiplies with 1 / x to divide by x."""
  np.testing.assert_allclose(np.asarray(ours), peer.numpy(), rtol=2e-7, atol=0)


def _peer(processor, logits, prompts=None):
  """A processor applied to each row alone, for they are of unequal lengths."""
  prompts = prompts if prompts is not None else [[0]] * len(logits)
  rows = [
    processor(torch.tensor(np.array([p])), torch.tensor(x[None]))
    for p, x in zip(prompts, logits, strict=True)
  ]
  return torch.cat(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 5, 2000])
def test_top_k_keeps_what_transformers_keeps(shape, k):
  logits = _logits(shape)
  found = warping.top_k(jnp.asarray(logits), jnp.full(len(logits), k))
  _same(found, _peer(transformers.TopKLogitsWarper(k), logits))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0505, 0.5005, 0.9005, 0.9995])
def test_top_p_keeps_what_transformers_keeps(shape, p):
  logits = _logits(shape, seed=3)
  rest = jnp.full(len(logits), 1 - p, jnp.float32)
  found = warping.top_p(jnp.asarray(logits), rest)
  peer = _peer(transformers.TopPLogitsWarper(p), logits)
  # Which of equal logits go first is torch's secret; how many go is not.
  _same(jnp.sort(found), peer.sort().values)
  distinct = [len(np.unique(row)) == len(row) for row in logits]
  _same(found[np.array(distinct)], peer[distinct])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(shape, p):
  logits = _logits(shape)
  found = warping.min_p(jnp.asarray(logits), jnp.full(len(logits), p, jnp.float32))
  _same(found, _peer(transformers.MinPLogitsWarper(p), logits))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_transformers(shape, penalty):
  logits, prompts = _logits(shape), _prompts(shape)
  found = warping.repetition_penalty(
    jnp.asarray(logits),
    history.of(prompts, 40),
    jnp.full(len(logits), penalty, jnp.float32),
  )
  _same(
    found,
    _peer(transformers.RepetitionPenaltyLogitsProcessor(penalty), logits, prompts),
  )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 31])
def test_n_grams_that_would_repeat_are_transformers(shape, size):
  logits, prompts = _logits(shape), _prompts(shape)
  found = warping.no_repeat_ngram(
    jnp.asarray(logits), history.of(prompts, 40), jnp.full(len(logits), size)
  )
  _same(found, _peer(transformers.NoRepeatNGramLogitsProcessor(size), logits, prompts))


def test_rows_differ_in_their_settings_and_one_program_does_all():
  logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
  prompts = [np.tile(p, 3) for p in _prompts((6, 50), seed=2)]
  each = [
    Decoding(),
    Decoding(temperature=0.7, top_k=5),
    Decoding(temperature=1.5, top_p=0.6, repetition_penalty=1.4),
    Decoding(temperature=1.0, min_p=0.2, no_repeat_ngram=2),
    Decoding(min_new_tokens=4, no_repeat_ngram=3),
    Decoding(temperature=2.0, top_k=20, top_p=0.8, min_p=0.1, min_new_tokens=2),
  ]
  new = np.array([3, 3, 3, 3, 3, 3], np.int32)
  compiled = []

  @jax.jit
  def both(logits, before, settings):
    compiled.append(1)
    found = warping.processed(
      logits, before, settings, jnp.asarray(new), jnp.array([1, 7])
    )
    return found, warping.warped(found, settings)

  for settings in (each, [Decoding()] * 6):
    before = history.of(prompts, 90)
    found = both(jnp.asarray(logits), before, rules.of(settings, np.arange(6)))
    for row, decoding in enumerate(settings):
      processors = transformers.LogitsProcessorList(_processors(decoding, prompts[row]))
      peer = _peer(processors, logits[[row]], [prompts[row]])
      _same(found[1 if decoding.temperature else 0][row][None], peer)
  assert len(compiled) == 1


def _processors(decoding, prompt):
  """transformers' processors of settings, in the order of its `generate`."""
  if decoding.repetition_penalty != 1:
    yield transformers.RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)
  if decoding.no_repeat_ngram:
    yield transformers.NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram)
  if decoding.min_new_tokens:
    # Three of the prompt's tokens stand for new ones.
    yield transformers.MinNewTokensLengthLogitsProcessor(
      len(prompt) - 3, decoding.min_new_tokens, [1, 7]
    )
  if decoding.temperature:
    yield transformers.TemperatureLogitsWarper(decoding.temperature)
  if decoding.top_k:
    yield transformers.TopKLogitsWarper(decoding.top_k)
  if decoding.top_p < 1:
    yield transformers.TopPLogitsWarper(decoding.top_p)
  if decoding.min_p:
    yield transformers.MinPLogitsWarper(decoding.min_p)
