"""DoRA and LoRA with a bias, against merged weights (against PEFT: tests/methods)."""

import dataclasses

import jax
import numpy as np
import pytest

import lorax_flax as lx
from tests.adapt.checks import check_equals_merged, check_no_dense_gradient, perturbed
from tests.methods.layers import FUNCTIONS, inputs, params


def moved(kind, **kwargs):
  """An adapted layer of this kind, its base, an adapter that does something, an x."""
  base, x = params(kind), inputs(kind)
  config = lx.LoraConfig(rank=2, alpha=6, targets="kernel", **kwargs)
  lora = lx.adapt(FUNCTIONS[kind], config)
  return lora, base, perturbed(lora.init(jax.random.key(0), base, x)), x


@pytest.mark.parametrize(
  ("kind", "field"),
  [
    ("linear", "use_dora"),
    ("embedding", "use_dora"),
    ("conv", "use_dora"),
    ("linear", "lora_bias"),
    ("conv", "lora_bias"),
  ],
)
def test_a_method_equals_merged_weights_and_makes_no_dense_gradient(kind, field):
  lora, base, adapter, x = moved(kind, **{field: True})
  merged = lx.merge(base, adapter)
  assert np.abs(merged["kernel"] - base["kernel"]).max() > 1e-3
  np.testing.assert_allclose(
    lora.apply(base, adapter, x), FUNCTIONS[kind](merged, x), rtol=1e-4, atol=1e-4
  )
  check_no_dense_gradient(lora, base, adapter, x)


def test_dora_is_refused_by_unmerge():
  _, base, adapter, _ = moved("linear", use_dora=True)
  with pytest.raises(lx.LoraxError, match="cannot be taken out of 'kernel'"):
    lx.unmerge(lx.merge(base, adapter), adapter)


def test_a_bias_is_merged_into_the_bases_and_taken_out_again():
  lora, base, adapter, x = moved("linear", lora_bias=True)
  check_equals_merged(lora, FUNCTIONS["linear"], base, adapter, x)
  back = lx.unmerge(lx.merge(base, adapter), adapter)
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-6), back, base)
  with pytest.raises(lx.LoraxError, match="has no 'bias'"):
    lx.merge({"kernel": base["kernel"]}, adapter)


@pytest.mark.parametrize(
  ("alias", "method"), [("use_dora", "dora"), ("lora_bias", "lora_bias")]
)
def test_a_method_has_an_alias(alias, method):
  config = lx.LoraConfig(**{alias: True})
  assert config.method == method
  assert config == lx.LoraConfig(method=method)
  assert dataclasses.replace(config, method="lora").method == "lora"
  assert lx.LoraConfig(**{alias: False}).method == "lora"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"method": "dora", "lora_bias": True}, "lora_bias=True contradicts method='dora'"),
    ({"method": "dora", "use_dora": False}, "use_dora=False contradicts method='dora'"),
    ({"method": "drora"}, "unknown LoraConfig.method 'drora'; did you mean 'dora'"),
    ({"method": "full"}, "unknown LoraConfig.method 'full'"),
    ({"options": {"depth": 3}}, "unknown option of lora 'depth'"),
  ],
)
def test_a_method_that_can_not_be_is_an_error(fields, message):
  with pytest.raises(lx.LoraxError, match=message):
    lx.LoraConfig(**fields)


def test_dora_and_a_bias_do_not_go_together():
  with pytest.raises(lx.LoraxError, match="do not go together"):
    lx.LoraConfig(use_dora=True, lora_bias=True)
