"""Prefill and steps of a decoder, against transformers' generation."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lorax_flax.models import registry
from lorax_flax.serve import decoder
from tests.models import test_packing

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NEW = 12
LONG, SHORT = np.arange(3, 13).tolist(), [5, 3]


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
  return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", test_packing.FAMILIES)
def test_greedy_tokens_are_those_of_transformers(tmp_path, name):
  model = test_packing.FAMILIES[name](tmp_path)
  loaded = registry.load(tmp_path)
  made = decoder.decoder_of(loaded)
  for prompt in (LONG, SHORT):
    inputs = decoder.prompts([prompt], most=16)
    got = greedy(made, loaded.params, inputs, loaded.blank_cache(1, 22))
    assert got[0].tolist() == peers(model, prompt)
