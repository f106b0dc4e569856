"""Moments of the targets' inputs, and the adapters that start with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.adapt.activations import input_moments
from tests.adapt.checks import perturbed

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 12)).astype("f4")
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


def test_rho_of_one_leaves_the_ranks():
  params = {"kernel": jnp.stack([jnp.eye(12)] * 2)}
  fields = {"targets": "kernel", "init": "eva", "init_options": {"rho": 1.0}}
  fn = lambda p, x: (x @ p["kernel"][0]) ** 3 @ p["kernel"][1]
  lora = lx.adapt(fn, lx.LoraConfig(rank=3, stack_axes={"kernel": (0,)}, **fields))
  adapter = lx.init_from_activations(lora, jax.random.key(0), params, [(X,)])
  assert adapter["kernel"].a.shape == (2, 12, 3)
  assert [np.linalg.matrix_rank(a) for a in adapter["kernel"].a] == [3, 3]


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
