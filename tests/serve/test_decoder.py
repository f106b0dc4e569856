"""Prefill and steps of a decoder, against transformers' generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lorax_flax as lx
from lorax_flax.models import registry
from lorax_flax.serve import decoder
from tests.adapt import checks
from tests.models import test_decoder, test_packing, test_t5

NEW = 12
LONG, SHORT = np.arange(3, 13).tolist(), [5, 3]


@pytest.fixture(autouse=True)
def seed():
  """Models drawn alike in each run: of two tokens that are nearly equal either wins."""
  torch.manual_seed(0)


def greedy(made, params, inputs, cache, count=NEW):
  """The ids of `count` steps, Bxcount."""
  logits, cache = made.prefill(params, inputs, cache)
  found = [jnp.argmax(logits, axis=-1)]
  for _ in range(count - 1):
    logits, cache = made.step(params, found[-1], cache)
    found.append(jnp.argmax(logits, axis=-1))
  return np.stack(found, axis=1)


def peers(model, ids, count=NEW):
  """The same by transformers."""
  model.generation_config.eos_token_id = None
  ids = torch.tensor([ids])
  found = model.generate(
    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
  )
  own = 1 if model.config.is_encoder_decoder else ids.shape[1]
  return found[0, own:].tolist()


@pytest.mark.parametrize("name", test_packing.FAMILIES)
def test_greedy_tokens_are_those_of_transformers(tmp_path, name):
  model = test_packing.FAMILIES[name](tmp_path)
  loaded = registry.load(tmp_path)
  made = decoder.decoder_of(loaded)
  for prompt in (LONG, SHORT):
    inputs = decoder.prompts([prompt], most=16)
    got = greedy(made, loaded.params, inputs, loaded.blank_cache(1, 22))[0].tolist()
    expected = peers(model, prompt)
    if name == "phi3" and prompt == SHORT:
      # Where its long scaling sets in, transformers computes all tokens anew.
      got, expected = got[:8], expected[:8]
    assert got == expected


@pytest.mark.parametrize("scan", [False, True])
@test_t5.VERSIONS
def test_greedy_tokens_of_an_encoder_and_decoder_are_those_of_transformers(
  tmp_path, version, scan
):
  # Its generate breaks where the decoder has more layers than the encoder.
  model = test_t5.save(tmp_path, **version, num_layers=3)
  loaded = registry.load(tmp_path, scan=scan)
  source = decoder.prompts([LONG, SHORT], most=16)
  start = decoder.prompts([[0], [0]], most=1)
  inputs = source | {f"decoder_{name}": x for name, x in start.items()}
  cache = loaded.blank_cache(2, NEW, source["input_ids"].shape[1])
  got = greedy(decoder.decoder_of(loaded), loaded.params, inputs, cache)
  assert got.tolist() == [peers(model, prompt) for prompt in (LONG, SHORT)]


@pytest.mark.parametrize(("name", "method"), [("mixtral", "dora"), ("t5", "lora")])
def test_an_unmerged_adapter_says_what_the_merged_model_says(tmp_path, name, method):
  save = test_t5.save if name == "t5" else test_packing.FAMILIES[name]
  save(tmp_path)
  loaded = registry.load(tmp_path)
  inputs = decoder.prompts([LONG, SHORT], most=16)
  if name == "t5":
    start = decoder.prompts([[2], [3]], most=1)
    inputs |= {f"decoder_{name}": x for name, x in start.items()}
  plain = lambda params, **inputs: loaded.module.apply({"params": params}, **inputs)
  lora = lx.adapt(plain, lx.LoraConfig(rank=2, method=method))
  adapter = checks.perturbed(lora.init(jax.random.key(1), loaded.params, **inputs))
  blank = lambda: loaded.blank_cache(2, 22, 16)
  both = loaded.params, adapter
  made = decoder.decoder_of(loaded, decoder.adapted(loaded))
  got = greedy(made, both, inputs, blank())
  made = decoder.decoder_of(loaded)
  merged = lx.merge(loaded.params, adapter)
  assert got.tolist() == greedy(made, merged, inputs, blank()).tolist()
  assert got.tolist() != greedy(made, loaded.params, inputs, blank()).tolist()


def test_a_negative_id_leaves_its_row_as_it_is(tmp_path):
  test_decoder.PEERS["mistral"].save(tmp_path)
  loaded = registry.load(tmp_path)
  made = decoder.decoder_of(loaded)

  def after(*steps):
    cache = loaded.blank_cache(2, 22)
    _, cache = made.prefill(loaded.params, decoder.prompts([LONG, SHORT], 16), cache)
    for ids in steps:
      logits, cache = made.step(loaded.params, jnp.array(ids), cache)
    return logits, cache.lengths_B

  (got, lengths), (expected, _) = after([4, 5], [-1, 6], [7, -1]), after([4, 5], [7, 6])
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
  np.testing.assert_array_equal(lengths, [12, 4])


def test_a_prompt_without_room_is_an_error(tmp_path):
  test_packing.FAMILIES["gpt2"](tmp_path)
  loaded = registry.load(tmp_path)
  made = decoder.decoder_of(loaded)
  inputs = decoder.prompts([LONG, SHORT], most=16)
  _, cache = made.prefill(loaded.params, inputs, loaded.blank_cache(2, 16))
  with pytest.raises(lx.LoraxError, match="row 0 of 20 tokens for a cache of 16"):
    made.prefill(loaded.params, inputs, cache)
  with pytest.raises(lx.LoraxError, match="from 1 to 9"):
    decoder.prompts([LONG, SHORT], most=9)
