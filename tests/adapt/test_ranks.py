"""A rank and an alpha for each layer of a stacked weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from tests.adapt.checks import check_equals_merged, perturbed

LAYERS, WIDTH = 4, 5
PARAMS = {
  "layers": {
    "kernel": jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)),
    "bias": jnp.zeros((LAYERS, WIDTH)),
  },
  "head": {"kernel": jnp.ones((WIDTH, 3))},
}
X = jax.random.normal(jax.random.key(1), (2, WIDTH))
KERNEL = "layers/kernel"


def fn(params, x):
  def layer(x, p):
    return jnp.tanh(x @ p["kernel"] + p["bias"][None]), None

  x, _ = jax.lax.scan(layer, x, params["layers"])
  return x @ params["head"]["kernel"]


def start(**config):
  config = {"targets": [KERNEL], "rank": 3, "alpha": 6.0} | config
  lora = lx.adapt(fn, lx.LoraConfig(**config))
  return lora, lora.init(jax.random.key(2), PARAMS, X)


def test_each_layer_has_its_own_rank_and_scale_and_the_rest_zeros():
  lora, adapter = start(
    rank_pattern={KERNEL: (1, 0, 3, 2)}, alpha_pattern={KERNEL: (2.0, 9.0, 3.0, 4.0)}
  )
  delta = adapter[KERNEL]
  assert delta.layers == (0, 2, 3)
  assert delta.a.shape == (3, WIDTH, 3)
  np.testing.assert_allclose(delta.scale, [2, 1, 2])
  assert [int(a.any(0).sum()) for a in delta.a] == [1, 3, 2]
  target = lora.plan(PARAMS, X).targets[0]
  assert target.size == 6 * 2 * WIDTH
  assert "1 3 2" in str(lora.plan(PARAMS, X))


def test_zeros_beyond_a_layers_rank_stay_zeros():
  ranks = (1, 3, 3, 2)
  lora, adapter = start(rank_pattern={KERNEL: ranks})
  used = jnp.arange(3)[None, :, None] < jnp.asarray(ranks)[:, None, None]
  b = jnp.broadcast_to(jnp.where(used, 0.3, 0.0), adapter[KERNEL].b.shape)
  delta = dataclasses.replace(adapter[KERNEL], b=b)
  grads = jax.grad(lambda d: jnp.sum(lora.apply(PARAMS, {KERNEL: d}, X) ** 2))(delta)
  for layer, rank in enumerate(ranks):
    assert grads.a[layer, :, :rank].any()
    assert not grads.a[layer, :, rank:].any()
    assert not grads.b[layer, rank:].any()


def test_one_value_for_all_layers_is_the_same_as_that_value():
  _, one = start(rank_pattern={KERNEL: 2})
  _, each = start(rank_pattern={KERNEL: (2,) * LAYERS})
  assert one[KERNEL].scale.shape == each[KERNEL].scale.shape == ()
  jax.tree.map(np.testing.assert_array_equal, one, each)


def test_some_layers_of_a_stacked_leaf_are_trained_in_full():
  lora, adapter = start(
    targets=(), tuned=["layers/bias"], tuned_layers={"layers/bias": (1, 3)}
  )
  delta = adapter["layers/bias"]
  assert delta.value.shape == (2, WIDTH)
  moved = perturbed(adapter)
  check_equals_merged(lora, fn, PARAMS, moved, X)
  bias = lx.merge(PARAMS, moved)["layers"]["bias"]
  assert [bool(row.any()) for row in bias] == [False, True, False, True]
  back = lx.unmerge(lx.merge(PARAMS, moved), moved)
  jax.tree.map(np.testing.assert_array_equal, back, PARAMS)
  assert "layers 1 3 in full" in str(lora.plan(PARAMS, X))


def test_the_biases_beside_targets_are_trained_in_the_layers_that_have_factors():
  _, adapter = start(rank_pattern={KERNEL: (0, 2, 2, 0)}, bias="lora_only")
  assert adapter["layers/bias"].layers == adapter[KERNEL].layers == (1, 2)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"rank_pattern": {KERNEL: (1, 2)}}, "has 4 layers, and 2 values are given"),
    ({"rank_pattern": {KERNEL: (1, 2, 3, 4)}, "layers": [0]}, "do not go together"),
    (
      {"targets": ["head"], "rank_pattern": {"head": (1, 2, 3, 4)}},
      "one layer alone",
    ),
    ({"rank_pattern": {KERNEL: (0,) * 4}}, "must be an int >= 1"),
    ({"alpha_pattern": {KERNEL: (1, 0, 1, 1)}}, "must be > 0"),
    ({"tuned_layers": {"layers/bias": (0,)}}, "unknown tuned_layers: tuned path"),
    (
      {"tuned": ["layers/bias"], "tuned_layers": {"layers/bias": (4,)}},
      "has 4 layers, not 4",
    ),
  ],
)
def test_values_that_do_not_fit_the_layers_are_an_error(config, message):
  with pytest.raises(lx.LoraxError, match=message):
    start(**config)
