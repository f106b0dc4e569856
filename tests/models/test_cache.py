"""Calls with a cache equal one call with all tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.models import cache as caches
from lorax_flax.models import registry
from tests.adapt import checks
from tests.models import test_decoder, test_packing, test_t5

# Scalings that look at a text's length rotate a key by the length when it was written,
# so that one call with all tokens differs: these are compared with transformers alone.
BY_LENGTH = ("llama, dynamic", "phi3")
PROMPTS, LENGTH = (9, 4, 7), 23


_SOURCE = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]], np.int32)


def load(folder, name, **options):
  if name == "t5":
    test_t5.save(folder)
  else:
    test_packing.FAMILIES[name](folder)
  return registry.load(folder, **options)


def chunks():
  """Masks of calls: unequal prompts, single tokens, chunks of which rows take less."""
  yield np.arange(max(PROMPTS)) < np.array(PROMPTS)[:, None]
  for _ in range(4):
    yield np.ones((3, 1), bool)
  yield np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
  yield np.array([[1], [0], [1]], bool)
  yield np.ones((3, 3), bool)


def check_chunks(loaded, run, tolerance=1e-5):
  """Logits of calls with a cache are those of one call: run(**inputs) -> outputs."""
  rng = np.random.default_rng(0)
  source = {"input_ids": _SOURCE * 7, "attention_mask": _SOURCE}
  prefix = "decoder_" if loaded.family.task == "seq2seq-lm" else ""
  first = source if prefix else {}
  cache = loaded.blank_cache(3, LENGTH, 4)
  run = jax.jit(run)

  def inputs(ids, mask):
    named = {"input_ids": ids, "attention_mask": mask.astype(np.int32)}
    return {f"{prefix}{name}": x for name, x in named.items()}

  texts, found = [[], [], []], [[], [], []]
  for number, mask in enumerate(chunks()):
    ids = rng.integers(3, 37, mask.shape).astype(np.int32)
    given = inputs(ids, mask) | (first if number == 0 else {})
    logits, cache = run(cache=cache, **given)
    for row, real in enumerate(mask):
      texts[row] += ids[row, real].tolist()
      found[row] += list(np.asarray(logits)[row, real])
  lengths = np.array([len(text) for text in texts])
  np.testing.assert_array_equal(cache.lengths_B, lengths)
  mask = np.arange(LENGTH) < lengths[:, None]
  ids = np.zeros((3, LENGTH), np.int32)
  ids[mask] = np.concatenate(texts)
  full = run(**inputs(ids, mask), **first)
  for row, length in enumerate(lengths):
    expected = np.asarray(full)[row, :length]
    np.testing.assert_allclose(found[row], expected, rtol=tolerance, atol=tolerance)


NAMES = [n for n in (*test_packing.FAMILIES, "t5") if n not in BY_LENGTH]
# Each scanned; not scanned those whose layers differ, and the models of their own.
ALONE = ("gpt2", "mistral", "gemma3", "t5")


@pytest.mark.parametrize(
  ("name", "scan"), [*((n, True) for n in NAMES), *((n, False) for n in ALONE)]
)
def test_chunks_equal_one_call_with_all_tokens(tmp_path, name, scan):
  loaded = load(tmp_path, name, scan=scan)
  check_chunks(loaded, partial(loaded.module.apply, {"params": loaded.params}))


def test_chunks_are_close_in_bfloat16(tmp_path):
  test_decoder.PEERS["gemma3"].save(tmp_path, initializer_range=0.05)
  loaded = registry.load(tmp_path, dtype="bfloat16")
  assert loaded.blank_cache(1, 8).layers[0][0].dtype == jnp.bfloat16
  run = partial(loaded.module.apply, {"params": loaded.params})
  check_chunks(loaded, run, tolerance=0.03)


@pytest.mark.parametrize(("name", "method"), [("gpt2", "lora"), ("gemma3", "dora")])
def test_chunks_with_an_unmerged_adapter_equal_one_call(tmp_path, name, method):
  loaded = load(tmp_path, name, scan=method == "dora")
  forward = lambda params, **inputs: loaded.module.apply({"params": params}, **inputs)
  lora = lx.adapt(forward, lx.LoraConfig(rank=2, method=method))
  sizes = loaded.family.inputs(loaded.config)
  adapter = checks.perturbed(lora.init(jax.random.key(1), loaded.params, **sizes))
  check_chunks(loaded, partial(lora.apply, loaded.params, adapter))


def test_a_window_shorter_than_the_text_keeps_its_window_alone(tmp_path):
  loaded = load(tmp_path, "gemma3")
  sliding, full = (k.shape[2] for k, _ in loaded.blank_cache(2, LENGTH).layers)
  assert (sliding, full) == (4, LENGTH)
  scanned = registry.load(tmp_path, scan=True)
  k, _ = jax.eval_shape(lambda: scanned.blank_cache(2, LENGTH)).layers
  assert k.shape == (2, 2, 2, LENGTH, 6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_taken_go_on_as_the_rows_they_were(tmp_path, name, scan):
  loaded = load(tmp_path, name, scan=scan)
  prefix = "decoder_" if name == "t5" else ""
  run = jax.jit(partial(loaded.module.apply, {"params": loaded.params}))
  first = {"input_ids": _SOURCE * 7, "attention_mask": _SOURCE} if prefix else {}
  ids = np.array([[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 0, 0]], np.int32)
  given = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": np.sign(ids)}
  _, cache = run(cache=loaded.blank_cache(3, 9, 4), **first, **given)
  rows = jnp.array([2, 0, 2, 1])
  step = lambda n: (
    {f"{prefix}input_ids": jnp.full((n, 1), 7)}
    | {f"{prefix}attention_mask": jnp.ones((n, 1), jnp.int32)}
  )
  expected, _ = run(cache=cache, **step(3))
  got, after = run(cache=cache.take(rows), **step(4))
  np.testing.assert_allclose(got, expected[rows], atol=1e-5)
  np.testing.assert_array_equal(after.lengths_B, [3, 5, 3, 4])
  assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_what_does_not_fit_is_an_error(tmp_path):
  loaded = load(tmp_path, "gpt2")
  run = partial(loaded.module.apply, {"params": loaded.params})
  ids = jnp.ones((2, 5), jnp.int32)
  inputs = {"input_ids": ids, "attention_mask": ids}
  with pytest.raises(lx.LoraxError, match="24 tokens: the model takes at most 23"):
    loaded.blank_cache(2, 24)
  with pytest.raises(lx.LoraxError, match="5 tokens for a cache of 4"):
    run(cache=loaded.blank_cache(2, 4), **inputs)
  with pytest.raises(lx.LoraxError, match="2 rows for a cache of 3"):
    run(cache=loaded.blank_cache(3, 8), **inputs)
  with pytest.raises(lx.LoraxError, match="position_ids beside a cache"):
    run(cache=loaded.blank_cache(2, 8), position_ids=ids, **inputs)
  with pytest.raises(lx.LoraxError, match="deterministic=True"):
    run(cache=loaded.blank_cache(2, 8), deterministic=False, **inputs)
  cache = run(cache=loaded.blank_cache(2, 8), **inputs)[1]
  caches.check_room(cache, 3)
  with pytest.raises(lx.LoraxError, match="row 1 of 9 tokens for a cache of 8"):
    caches.check_room(cache, [3, 4])


def test_an_encoders_text_must_fit_and_be_there(tmp_path):
  loaded = load(tmp_path, "t5")
  run = partial(loaded.module.apply, {"params": loaded.params})
  ids = jnp.ones((3, 2), jnp.int32)
  source = {"input_ids": _SOURCE, "attention_mask": _SOURCE}
  with pytest.raises(lx.LoraxError, match=r"\(3, 4\) for a cache of \(3, 5\)"):
    run(cache=loaded.blank_cache(3, 8, 5), decoder_input_ids=ids, **source)
  with pytest.raises(lx.LoraxError, match="input_ids are needed"):
    run(decoder_input_ids=ids)


def test_a_model_that_does_not_generate_has_no_cache():
  outline = registry.outline({"model_type": "bert"})
  with pytest.raises(lx.LoraxError, match="a bert doesn't generate"):
    outline.blank_cache(1, 8)
