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
from lorax_flax.adapt.activations import input_moments
from tests.adapt.checks import check_no_dense_gradient, perturbed
from tests.methods.steps import trained_beside

pytestmark = pytest.mark.usefixtures("quick_to_compile")
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


def test_rho_of_one_leaves_the_ranks(layers):
  params = params_of(layers)
  fields = {"targets": [*params], "init": "eva", "init_options": {"rho": 1.0}}
  lora = lx.adapt(apply, lx.LoraConfig(rank=RANK, **fields))
  adapter = lx.init_from_activations(lora, jax.random.key(0), params, [(X,)])
  assert [delta.rank for delta in adapter.values()] == [RANK] * 3


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


KERNELS = jnp.asarray(RNG.normal(size=(3, 2, 6, 12)) / 3, jnp.float32)
TOKENS = jnp.asarray(RNG.normal(size=(4, 5, 12)), jnp.float32)
MASK = jnp.asarray(RNG.integers(0, 2, size=(4, 5)), jnp.float32)


def step(x, w):
  """Inputs in two axes, in another order than the kernel has them."""
  y = jnp.einsum("btdh,hdo->bto", jnp.swapaxes(x.reshape(4, 5, 2, 6), 2, 3), w)
  return jnp.tanh(y)


def scanned(params, x):
  body = jax.checkpoint(lambda x, w: (step(x, w), None))
  return jax.lax.scan(body, x, params["kernel"])[0]


def looped(params, x):
  for i in range(3):
    x = step(x, params["kernel"][i])
  return x


@pytest.mark.parametrize(
  ("fn", "fields"),
  [
    (scanned, {}),
    (scanned, {"layers": (0, 2)}),
    (looped, {"stack_axes": {"kernel": (0,)}}),
  ],
)
def test_moments_are_those_of_the_inputs_of_weight(fn, fields):
  config = lx.LoraConfig(targets="kernel", rank=2, init="eva", **fields)
  lora, params = lx.adapt(fn, config), {"kernel": KERNELS}
  targets = lora.plan(params, TOKENS).targets
  batches = [(TOKENS,), (TOKENS + 1,)]
  found = input_moments(lora, params, batches, targets, lambda x: MASK)["kernel"]
  want = []
  for (x,) in batches:
    each = []
    for i in range(3):
      rows = np.asarray(x)[MASK > 0]
      each.append((rows.T @ rows, rows.sum(0), len(rows)))
      x = step(x, KERNELS[i])
    want.append([each[i] for i in fields.get("layers", range(3))])
  for part, *of_batches in zip(
    found, *(zip(*w, strict=True) for w in want), strict=True
  ):
    np.testing.assert_allclose(
      part, sum(map(np.array, of_batches)), rtol=1e-4, atol=1e-4
    )


def test_stacked_layers_get_ranks_of_their_own_and_a_layer_of_none_is_left_out():
  # Four directions explain all of the first two layers' inputs, none those of the last.
  x = np.pad(RNG.normal(size=(40, 4)), ((0, 0), (0, 8))).astype("f4")
  noise = np.stack([0 * x, RNG.normal(size=(40, 12)), 0 * x]).astype("f4") * 100

  def fn(params, x):
    body = lambda x, each: (x @ each[0] + each[1], None)
    return jax.lax.scan(body, x, (params["kernel"], noise))[0]

  config = lx.LoraConfig(targets="kernel", rank=2, alpha=4, init="eva")
  lora, params = lx.adapt(fn, config), {"kernel": jnp.stack([jnp.eye(12)] * 3)}
  delta = lx.init_from_activations(lora, jax.random.key(0), params, [(x,)])["kernel"]
  assert delta.layers == (0, 1)
  ranks = [np.linalg.matrix_rank(a) for a in delta.a]
  assert sum(ranks) == 6
  assert delta.rank == max(ranks) <= 4
  np.testing.assert_allclose(delta.scale, 2.0)
  merged = lx.merge(params, perturbed({"kernel": delta}))["kernel"]
  np.testing.assert_array_equal(merged[2], np.eye(12))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"init": "eva", "init_options": {"rho": 0.5}}, "rho=0.5 must be at least 1"),
    ({"init": "eva", "init_options": {"rho": 9}}, "rank 18, and it has 12 inputs"),
    ({"init": "eva", "init_options": {"roh": 1}}, "did you mean 'rho'"),
    ({"init_options": {"rho": 2.0}}, "unknown option of init='uniform' 'rho'"),
    ({"init": "corda"}, "'corda' is a method: give method='corda'"),
    ({"init": "eva", "method": "vera"}, "init='eva' does nothing in vera"),
    ({"method": "corda", "options": {"mode": "imp"}}, "did you mean 'ipm'"),
    ({}, "looks at no inputs"),
  ],
  ids=str,
)
def test_what_these_starts_do_not_allow_is_refused(fields, message):
  params = {"kernel": jnp.eye(12)}

  def make():
    lora = lx.adapt(
      lambda p, x: x @ p["kernel"], lx.LoraConfig(targets="kernel", rank=2, **fields)
    )
    lx.init_from_activations(lora, jax.random.key(0), params, [(X,)])

  with pytest.raises(lx.LoraxError, match=message):
    make()


def test_inputs_that_are_not_met_or_not_given_are_an_error():
  params = {"kernel": jnp.eye(12)}
  config = lx.LoraConfig(targets="kernel", rank=2, init="eva")
  lora, key = lx.adapt(lambda p, x: x @ p["kernel"], config), jax.random.key(0)
  with pytest.raises(lx.LoraxError, match="starts from the inputs of its targets"):
    lora.init(key, params, X)
  with pytest.raises(lx.LoraxError, match="there is no batch"):
    lx.init_from_activations(lora, key, params, [])
  weights = {"weights": lambda x: jnp.zeros(64)}
  with pytest.raises(lx.LoraxError, match=r"kernel are not met .* rows of weight"):
    lx.init_from_activations(lora, key, params, [(X,)], **weights)
  weights = {"weights": lambda x: jnp.ones(63)}
  with pytest.raises(lx.LoraxError, match=r"weights of rows have shape \(63,\)"):
    lx.init_from_activations(lora, key, params, [(X,)], **weights)
  with pytest.raises(lx.LoraxError, match="are not finite"):
    lx.init_from_activations(lora, key, params, [(X * np.inf,)])
