"""Starts that look at their targets' inputs, EVA and CorDA, against PEFT's."""

import copy
import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights

import lorax_flax as lx
from tests.adapt.checks import check_no_dense_gradient, perturbed
from tests.methods.steps import trained_beside

WIDTH, RANK, ALPHA, LEARNING_RATE = 12, 3, 6, 1e-2
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(64, WIDTH)) * np.linspace(0.5, 1.5, WIDTH) + 1).astype("f4")


@pytest.fixture(scope="module")
def layers():
  torch.manual_seed(0)
  sizes = (WIDTH, WIDTH, WIDTH, 5)
  linear = [torch.nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)]
  with torch.no_grad():
    linear[0].weight[4:] *= 0.2  # four of its outputs have nearly all of the variance
  return torch.nn.Sequential(
    *itertools.chain(*((layer, torch.nn.Tanh()) for layer in linear))
  )


def apply(params, x):
  for kernel in params.values():
    x = jnp.tanh(x @ kernel)
  return x


def params_of(layers):
  return {
    n: jnp.asarray(m.weight.detach().numpy().T) for n, m in layers.named_children()
    if isinstance(m, torch.nn.Linear)
  }  # fmt: skip


def factors(model, name):
  """A and B of one of PEFT's modules, as a and b."""
  module = model.base_model.model.get_submodule(name)
  return (
    np.array(getattr(module, f"lora_{part}").default.weight.detach().numpy().T)
    for part in "AB"
  )


@pytest.mark.parametrize(
  "options", [{}, {"whiten": True, "adjust_scale": False}], ids=str
)
def test_eva_has_pefts_directions_ranks_and_scales_and_trains_as_it(options, layers):
  params = params_of(layers)
  fields = {"targets": [*params], "rank": RANK, "alpha": ALPHA, "init": "eva"}
  lora = lx.adapt(apply, lx.LoraConfig(**fields, init_options=options))
  adapter = lx.init_from_activations(lora, jax.random.key(0), params, [(X,)])
  np.testing.assert_array_equal(lora.apply(params, adapter, X), apply(params, X))

  theirs = {n.replace("scale", "scaling_factors"): x for n, x in options.items()}
  config = peft.LoraConfig(
    r=RANK,
    lora_alpha=ALPHA,
    target_modules=[*params],
    init_lora_weights="eva",
    eva_config=peft.EvaConfig(**theirs),
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it speaks of memory
    model = peft.get_peft_model(copy.deepcopy(layers), config)
  initialize_lora_eva_weights(
    model,
    [torch.tensor(X)],
    forward_fn=lambda model, x: model(x),
    prepare_model_inputs_fn=None,
    prepare_layer_inputs_fn=None,
    show_progress_bar=False,
  )
  # PEFT goes over the batch until nothing changes: twice, and so counts it.
  twice = 2**0.25 if options.get("whiten") else 1.0
  kept = {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
  assert adapter.keys() == kept
  for name, delta in adapter.items():
    first, second = factors(model, name)
    assert delta.a.shape == first.shape
    np.testing.assert_allclose(delta.a / twice, first, rtol=1e-3, atol=1e-4)
    assert not second.any()
    assert not np.any(delta.b)
    scaling = model.base_model.model.get_submodule(name).scaling["default"]
    np.testing.assert_allclose(delta.scale, scaling, rtol=1e-6)
  ranks = [delta.rank for delta in adapter.values()]
  assert sum(ranks) == 3 * RANK
  assert len({*ranks}) > 1
  same = {
    name: dataclasses.replace(delta, a=jnp.asarray(next(factors(model, name))))
    for name, delta in adapter.items()
  }
  end = trained_beside(lora, params, same, model, X, LEARNING_RATE)
  want = params_of(model.merge_and_unload())
  for name, kernel in lx.merge(params, end).items():
    np.testing.assert_allclose(kernel, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_as_pefts_and_trains_as_it(mode, layers):
  batches, params = [X, X[:40] ** 2], params_of(layers)
  config = lx.LoraConfig(
    targets=[*params],
    method="corda",
    rank=RANK,
    alpha=ALPHA,
    options={"mode": mode},
  )
  lora = lx.adapt(apply, config)
  key = jax.random.key(0)
  adapter = lx.init_from_activations(lora, key, params, [(x,) for x in batches])
  np.testing.assert_array_equal(lora.apply(params, adapter, X), apply(params, X))

  base = copy.deepcopy(layers)
  theirs = peft.LoraConfig(
    r=RANK,
    lora_alpha=ALPHA,
    target_modules=[*params],
    init_lora_weights="corda",
    corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
  )
  preprocess_corda(base, theirs, lambda: [base(torch.tensor(x)) for x in batches])
  model = peft.get_peft_model(base, theirs)
  same = {}
  for name, delta in adapter.items():
    first, second = map(jnp.asarray, factors(model, name))
    np.testing.assert_allclose(delta.a @ delta.b, first @ second, rtol=1e-3, atol=1e-4)
    # Of singular directions, the signs are the decomposition's choice.
    np.testing.assert_allclose(np.abs(delta.a), np.abs(first), rtol=5e-3, atol=1e-3)
    own = {"a": first, "b": second, "start_a": first, "start_b": second}
    same[name] = dataclasses.replace(delta, **own)
  check_no_dense_gradient(lora, params, perturbed(same), X)
  end = trained_beside(lora, params, same, model, X, LEARNING_RATE)
  want = params_of(model.merge_and_unload())
  for name, kernel in lx.merge(params, end).items():
    np.testing.assert_allclose(kernel, want[name], rtol=1e-4, atol=1e-5)
