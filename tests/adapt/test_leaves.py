"""Params of any kind: modules, and trees with keys, numbers and functions in them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax_flax as lx
from tests.adapt.checks import perturbed

X = jax.random.normal(jax.random.key(9), (6, 4))


class Net(nnx.Module):
  """Kernels, batch statistics, and a key and a count of random numbers."""

  def __init__(self, rngs):
    self.up = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.down = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


def net():
  module = Net(nnx.Rngs(0))
  module.eval()
  return lambda m, x: m(x), module


def tree():
  params = {
    "up": 0.3 * jax.random.normal(jax.random.key(0), (4, 8)),
    "down": 0.3 * jax.random.normal(jax.random.key(1), (8, 2)),
    "scale": 2.0,
    "layers": 3,
    "act": jnp.tanh,
    "key": jax.random.key(3),
    "ids": jnp.arange(3),
    "half": jnp.ones(2, jnp.bfloat16),
  }
  return lambda p, x: p["scale"] * (p["act"](x @ p["up"]) @ p["down"]), params


def equinox_module():
  module = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
  return lambda m, x: jax.vmap(m)(x), module


@pytest.mark.parametrize("make", [net, tree, equinox_module])
def test_any_tree_is_params(make):
  fn, params = make()
  lora = lx.adapt(
    fn, lx.LoraConfig(rank=2, targets=r".*(up|down|\d)(/kernel|/weight)?")
  )
  assert len(lora.plan(params, X).targets) == 2
  adapter = perturbed(lora.init(jax.random.key(1), params, X))
  merged = lx.merge(params, adapter)
  np.testing.assert_allclose(
    lora.apply(params, adapter, X), fn(merged, X), rtol=1e-5, atol=1e-5
  )
  assert not np.allclose(fn(merged, X), fn(params, X))
  back = lx.unmerge(merged, adapter)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  np.testing.assert_allclose(fn(back, X), fn(params, X), rtol=1e-5, atol=1e-5)


def test_merging_returns_untouched_leaves_as_they_are():
  fn, params = tree()
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up"]))
  adapter = lora.init(jax.random.key(1), params, X)
  for new in (lx.merge(params, adapter), lx.unmerge(params, adapter)):
    assert all(new[name] is params[name] for name in params if name != "up")


def test_an_adapter_of_what_is_no_array_is_an_error():
  fn, params = tree()
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up"]))
  adapter = lora.init(jax.random.key(1), params, X)
  with pytest.raises(lx.LoraxError, match="scale"):
    lx.merge(params, {"scale": adapter["up"]})


def test_an_nnx_model_trains_with_its_state():
  model = Net(nnx.Rngs(0))
  graph, params, state = nnx.split(model, nnx.Param, ...)

  def fn(params, state, x):
    model = nnx.merge(graph, params, state, copy=True)
    return model(x), nnx.state(model, nnx.Not(nnx.Param))

  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up", "down"]))
  adapter = perturbed(lora.init(jax.random.key(1), params, state, X))
  first, state = jax.jit(lora.apply)(params, adapter, state, X)
  second, state = jax.jit(lora.apply)(params, adapter, state, X)
  assert not np.allclose(first, second), "dropout's count stood still"
  assert np.abs(state["norm"]["mean"][...]).max() > 0, "no batch statistics"


def test_nnx_update_writes_merged_weights_through_to_params():
  """nnx.split shares the model's Variables; merging itself leaves params alone."""
  model = Net(nnx.Rngs(0))
  model.eval()
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  fn = lambda p, x: nnx.merge(graph, p, rest, copy=True)(x)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up"]))
  adapter = perturbed(lora.init(jax.random.key(1), params, X))
  base = np.array(params["up"]["kernel"][...])
  merged = lx.merge(params, adapter)
  np.testing.assert_array_equal(params["up"]["kernel"][...], base)
  nnx.update(model, merged)
  np.testing.assert_array_equal(model.up.kernel[...], merged["up"]["kernel"][...])
  np.testing.assert_array_equal(
    params["up"]["kernel"][...], merged["up"]["kernel"][...]
  )
  back = lx.unmerge(params, adapter)
  np.testing.assert_allclose(back["up"]["kernel"][...], base, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_swaps_in_place_do_not_drift(dtype):
  """Each adapter is merged into the base that is kept, over what was merged before."""
  params = tree()[1]
  params = {name: params[name].astype(dtype) for name in ("up", "down")}
  lora = lx.adapt(
    lambda p, x: x @ p["up"] @ p["down"], lx.LoraConfig(rank=2, targets=["up", "down"])
  )
  start = lora.init(jax.random.key(1), params, X.astype(dtype))
  adapters = [perturbed(start, seed) for seed in (1, 2)]
  base = jax.tree.map(np.array, params)

  @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
  def swap(old, params, adapter):
    del old  # Its buffers take what is merged now.
    return lx.merge(params, adapter)

  @jax.jit
  def undo(merged, old, adapter):
    return lx.merge(lx.unmerge(merged, old), adapter)

  merged = swap(jax.tree.map(jnp.copy, params), params, adapters[0])
  first = jax.tree.map(np.array, merged)
  places = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(merged)}
  undone = lx.merge(params, adapters[0])
  for i in range(1, 101):
    merged = swap(merged, params, adapters[i % 2])
    undone = undo(undone, adapters[(i - 1) % 2], adapters[i % 2])
  assert swap._cache_size() == 1
  assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(merged)} == places
  same = lambda tree, other: jax.tree.all(jax.tree.map(np.array_equal, tree, other))
  assert same(merged, first)
  assert same(params, base)
  assert not same(undone, first), "taking an adapter out again rounds each time"
