"""Rows with adapters of their own, of every family, against each row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lorax_flax as lx
from lorax_flax.models import registry
from lorax_flax.serve import decoder
from tests.adapt import checks
from tests.models import (
  peers,
  test_deberta,
  test_distilbert,
  test_gpt2,
  test_packing,
  test_t5,
  test_vit,
)

FAMILIES = {
  "bert": (peers.save, peers.batch),
  "deberta": (
    lambda folder: test_deberta.save(folder, test_deberta.V2),
    test_deberta.batch,
  ),
  "distilbert": (test_distilbert.save, test_distilbert.batch),
  "roberta": (
    lambda folder: peers.save(folder, "roberta"),
    lambda: peers.batch("roberta"),
  ),
  "t5": (test_t5.save, lambda: test_t5.batch(7, 5, 4)),
  "vit": (test_vit.save, test_vit.batch),
  **{name: (save, test_gpt2.batch) for name, save in test_packing.FAMILIES.items()},
}
IDS = np.array([2, -1, 0, 1])


def adapters_of(loaded, inputs):
  """Three adapters of unlike ranks, targets and methods."""
  plain = lambda params, **inputs: loaded.module.apply({"params": params}, **inputs)
  found = []
  for i, config in enumerate(({"rank": 2}, {"rank": 3, "method": "dora"}, {"rank": 1})):
    lora = lx.adapt(plain, lx.LoraConfig(alpha=3, **config))
    adapter = lora.init(jax.random.key(i), loaded.params, **inputs)
    found.append(checks.perturbed(adapter, i))
  found[-1] = dict([*found[-1].items()][::2])
  return lora, found


def alone_params(loaded, adapters, i):
  """The base with one of the adapters in it, or none."""
  return lx.merge(loaded.params, adapters[i]) if i >= 0 else loaded.params


def filled(lora, loaded, adapters):
  many = lx.many(lora, capacity=4, max_rank=4)
  slots = many.empty(loaded.params, *adapters)
  for i, adapter in enumerate(adapters):
    slots = many.put(loaded.params, slots, i, adapter)
  return many, slots


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_three_adapters_equal_each_alone(tmp_path, name):
  torch.manual_seed(0)
  save, batch = FAMILIES[name]
  save(tmp_path)
  loaded, inputs = registry.load(tmp_path, scan=name == "bert"), batch()
  ids = IDS[: len(next(iter(inputs.values())))]
  lora, adapters = adapters_of(loaded, inputs)
  many, slots = filled(lora, loaded, adapters)
  got = jax.jit(many.apply)(loaded.params, slots, ids, **inputs)
  alone = jax.jit(lora.apply_fn)
  for row, i in enumerate(ids):
    one = {key: x[row : row + 1] for key, x in inputs.items()}
    base = alone(loaded.params, **one)[0]
    expected = alone(alone_params(loaded, adapters, i), **one)[0]
    np.testing.assert_allclose(got[row], expected, atol=5e-5)
    assert (np.abs(expected - base).max() > 0.01) == (i >= 0)


@pytest.mark.parametrize(
  ("name", "scan"),
  [("gpt2", False), ("mistral", True), ("t5", False), ("t5", True)],
)
def test_a_decoders_rows_equal_each_alone(tmp_path, name, scan):
  torch.manual_seed(0)
  (test_t5.save if name == "t5" else test_packing.FAMILIES[name])(tmp_path)
  loaded = registry.load(tmp_path, scan=scan)
  rows = [[*range(3, 13)], [5, 3], [7, 8, 9], [4]]
  inputs = decoder.prompts(rows, most=16)
  if name == "t5":
    start = decoder.prompts([[2], [3], [2], [2]], most=1)
    inputs |= {f"decoder_{name}": x for name, x in start.items()}
  lora, adapters = adapters_of(loaded, inputs)
  _, slots = filled(lora, loaded, adapters)
  mixed = decoder.decoder_of(loaded, decoder.many(loaded))
  alone = decoder.decoder_of(loaded)
  steps = [jnp.array(ids) for ids in ([4, 5, 6, 7], [8, -1, 9, 3])]

  def run(made, params):
    logits, cache = made.prefill(params, inputs, loaded.blank_cache(4, 22, 16))
    found = [logits]
    for ids in steps:
      logits, cache = made.step(params, ids, cache)
      found.append(logits)
    return np.stack(found), np.asarray(cache.lengths_B)

  got, lengths = run(mixed, (loaded.params, slots, IDS))
  for row, i in enumerate(IDS):
    params = alone_params(loaded, adapters, i)
    expected, expected_lengths = run(alone, params)
    # Of a row that a step leaves out the logits mean nothing.
    real = [True, True, row != 1]
    np.testing.assert_allclose(got[real, row], expected[real, row], atol=5e-5)
    np.testing.assert_array_equal(lengths, expected_lengths)
