"""Calls with a cache equal one call with all tokens, and transformers' generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_flax.models import registry
from tests.models import test_packing

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# Scalings that look at a text's length rotate a key by the length when it was written,
# so that one call with all tokens differs: these are compared with transformers alone.
BY_LENGTH = ("llama, dynamic", "phi3")
PROMPTS, LENGTH = (9, 4, 7), 23


def apply(loaded):
  def run(params, cache, ids, mask):
    inputs = {"input_ids": ids, "attention_mask": mask}
    return loaded.module.apply({"params": params}, **inputs, cache=cache)

  return jax.jit(run)


def chunks(rng):
  """Masks of calls: unequal prompts, single tokens, chunks of which rows take less."""
  yield np.arange(max(PROMPTS)) < np.array(PROMPTS)[:, None]
  for _ in range(4):
    yield np.ones((3, 1), bool)
  yield np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
  yield np.array([[1], [0], [1]], bool)
  yield np.ones((3, 3), bool)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  "name", [n for n in test_packing.FAMILIES if n not in BY_LENGTH]
)
def test_chunks_equal_one_call_with_all_tokens(tmp_path, name, scan):
  test_packing.FAMILIES[name](tmp_path)
  loaded = registry.load(tmp_path, scan=scan)
  rng = np.random.default_rng(0)
  cache, run = loaded.blank_cache(3, LENGTH), apply(loaded)
  texts, found = [[], [], []], [[], [], []]
  for mask in chunks(rng):
    ids = rng.integers(3, 37, mask.shape).astype(np.int32)
    logits, cache = run(loaded.params, cache, ids, mask.astype(np.int32))
    for row, real in enumerate(mask):
      texts[row] += ids[row, real].tolist()
      found[row] += list(np.asarray(logits)[row, real])
  lengths = [len(text) for text in texts]
  np.testing.assert_array_equal(cache.lengths_B, lengths)
  mask = (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int32)
  ids = np.zeros_like(mask)
  for row, text in enumerate(texts):
    ids[row, : len(text)] = text
  inputs = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}
  full = loaded.module.apply({"params": loaded.params}, **inputs)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(found[row], full[row, :length], rtol=1e-5, atol=1e-5)
