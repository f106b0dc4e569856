"""How adapters start, drop out, train and come apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_flax as lx
from tests.adapt.checks import perturbed


def mlp(p, x):
  return jnp.tanh(x @ p["up"]) @ p["down"]


PARAMS = {
  "up": jax.random.normal(jax.random.key(0), (5, 64)),
  "down": jax.random.normal(jax.random.key(1), (64, 3)),
}
X = jax.random.normal(jax.random.key(2), (4, 5))


def test_the_start_depends_on_key_and_path_alone():
  one = lx.adapt(mlp, lx.LoraConfig(targets=["up"])).init(jax.random.key(3), PARAMS, X)
  two = lx.adapt(mlp, lx.LoraConfig(targets=["down", "up"]))
  two = two.init(jax.random.key(3), PARAMS, X)
  np.testing.assert_array_equal(one["up"].a, two["up"].a)
  other = lx.adapt(mlp, lx.LoraConfig(targets=["up"])).init(
    jax.random.key(4), PARAMS, X
  )
  assert not np.array_equal(one["up"].a, other["up"].a)


def test_a_starts_within_pefts_bound_and_b_at_zero():
  lora = lx.adapt(mlp, lx.LoraConfig(targets=["down"], rank=32))
  delta = lora.init(jax.random.key(3), PARAMS, X)["down"]
  bound = 1 / 8
  assert np.abs(delta.a).max() <= bound
  np.testing.assert_allclose(np.std(delta.a), bound / np.sqrt(3), rtol=0.05)
  assert not np.any(delta.b)


def test_an_embedding_starts_as_pefts_does():
  table = {"table": jnp.ones((11, 400))}
  lora = lx.adapt(lambda p, i: p["table"][i], lx.LoraConfig(targets="table", rank=4))
  delta = lora.init(jax.random.key(0), table, jnp.zeros((3,), jnp.int32))["table"]
  assert delta.a.shape == (11, 4)
  assert not np.any(delta.a)
  np.testing.assert_allclose(np.std(delta.b), 1.0, rtol=0.1)


def test_dropout_acts_only_where_a_key_is_given():
  lora = lx.adapt(mlp, lx.LoraConfig(targets=["up", "down"], dropout=0.5))
  adapter = perturbed(lora.init(jax.random.key(3), PARAMS, X))
  apply = lambda **kw: lora.apply(PARAMS, adapter, X, **kw)
  np.testing.assert_allclose(apply(), mlp(lx.merge(PARAMS, adapter), X), atol=1e-5)
  dropped = apply(dropout_key=jax.random.key(0))
  assert not np.allclose(dropped, apply())
  np.testing.assert_array_equal(dropped, apply(dropout_key=jax.random.key(0)))
  assert not np.allclose(dropped, apply(dropout_key=jax.random.key(1)))


def test_dropout_is_unbiased():
  fn = lambda p, x: x @ p["w"]
  params, x = {"w": jnp.zeros((5, 3))}, jnp.ones((1, 5))
  lora = lx.adapt(fn, lx.LoraConfig(targets="w", dropout=0.3))
  adapter = perturbed(lora.init(jax.random.key(3), params, x))
  keys = jax.random.split(jax.random.key(5), 20_000)
  many = jax.vmap(lambda k: lora.apply(params, adapter, x, dropout_key=k))(keys)
  np.testing.assert_allclose(
    many.mean(0), lora.apply(params, adapter, x), atol=0.02, rtol=0.02
  )


def test_dropout_is_the_same_under_scan_as_in_a_loop():
  def scanned(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

  def looped(p, x):
    for i in range(3):
      x = jnp.tanh(x @ p["w"][i])
    return x

  params = {"w": jax.random.normal(jax.random.key(0), (3, 5, 5))}
  config = lx.LoraConfig(targets="w", dropout=0.5)
  lora = lx.adapt(scanned, config)
  adapter = perturbed(lora.init(jax.random.key(3), params, X))
  key = jax.random.key(9)
  got = lora.apply(params, adapter, X, dropout_key=key)
  want = lx.adapt(looped, config).apply(params, adapter, X, dropout_key=key)
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert not np.allclose(got, lora.apply(params, adapter, X))


def test_every_use_of_a_weight_drops_its_own():
  twice = lambda p, x: (x @ p["w"], x @ p["w"])
  params = {"w": jnp.zeros((5, 3))}
  lora = lx.adapt(twice, lx.LoraConfig(targets="w", dropout=0.5))
  adapter = perturbed(lora.init(jax.random.key(3), params, X))
  one, two = lora.apply(params, adapter, X, dropout_key=jax.random.key(0))
  assert not np.allclose(one, two)


def test_apply_composes_with_vmap_over_adapters_and_scales():
  lora = lx.adapt(mlp, lx.LoraConfig(targets=["up", "down"]))
  adapters = [perturbed(lora.init(jax.random.key(i), PARAMS, X), i) for i in range(3)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)
  got = jax.vmap(lambda a: lora.apply(PARAMS, a, X))(stacked)
  for i, adapter in enumerate(adapters):
    np.testing.assert_allclose(got[i], lora.apply(PARAMS, adapter, X), atol=1e-5)


def test_merging_is_undone_in_any_storage_type():
  for dtype, tol in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
    params = jax.tree.map(lambda x, d=dtype: x.astype(d), PARAMS)
    lora = lx.adapt(mlp, lx.LoraConfig(targets=["up"], tuned=["down"]))
    adapter = perturbed(lora.init(jax.random.key(3), params, X.astype(dtype)))
    merged = lx.merge(params, adapter)
    assert merged["up"].dtype == dtype
    back = lx.unmerge(merged, adapter)
    for name in PARAMS:
      want = params[name].astype(jnp.float32)
      got = back[name].astype(jnp.float32)
      np.testing.assert_allclose(got, want, atol=tol, rtol=tol)


def test_a_tuned_leaf_replaces_the_base_leaf():
  lora = lx.adapt(mlp, lx.LoraConfig(targets=["up"], tuned=["down"]))
  adapter = perturbed(lora.init(jax.random.key(3), PARAMS, X))
  np.testing.assert_allclose(
    lora.apply(PARAMS, adapter, X), mlp(lx.merge(PARAMS, adapter), X), atol=1e-5
  )
  assert not np.allclose(adapter["down"].value, adapter["down"].original)


def test_partition_and_combine_are_inverse():
  lora = lx.adapt(mlp, lx.LoraConfig(targets=["up"], tuned=["down"]))
  adapter = lora.init(jax.random.key(3), PARAMS, X)
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  assert len(jax.tree.leaves(trained)) == 3
  assert len(jax.tree.leaves(rest)) == 2
  back = lx.combine(trained, rest)
  jax.tree.map(np.testing.assert_array_equal, back, adapter)
  with pytest.raises(lx.LoraxError, match="combine"):
    lx.combine(trained, adapter)


def test_freeze_leaves_frozen_leaves_alone_and_keeps_no_state_for_them():
  mask = lx.params_mask(PARAMS, ["down"])
  tx = lx.freeze(optax.adam(0.1), mask)
  state = tx.init(PARAMS)
  sizes = [x.shape for x in jax.tree.leaves(state)]
  assert (5, 64) not in sizes
  assert (64, 3) in sizes
  with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
  new = optax.apply_updates(PARAMS, updates)
  np.testing.assert_array_equal(new["up"], PARAMS["up"])
  assert not np.allclose(new["down"], PARAMS["down"])
  with pytest.raises(lx.LoraxError, match="did you mean 'down'"):
    lx.params_mask(PARAMS, ["dwon"])


@pytest.mark.parametrize("form", ["product", "conv"])
def test_dropout_of_dora_drops_what_its_magnitudes_add_to_the_base_too(form):
  # PEFT and the paper: x W + (g - 1) drop(x) W + g drop(x) a b; here g = 2, b = 0.
  shape = (6, 4) if form == "product" else (1, 1, 6, 4)
  kernel = jax.random.normal(jax.random.key(0), shape)

  def apply_fn(params, x):
    if form == "product":
      return x @ params["kernel"]
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x[:, None, None], params["kernel"], (1, 1), "VALID", dimension_numbers=dims
    )[:, 0, 0]

  params, x = {"kernel": kernel}, jnp.eye(6).repeat(40, axis=0)
  config = lx.LoraConfig(targets=["kernel"], rank=2, method="dora", dropout=0.5)
  lora = lx.adapt(apply_fn, config)
  ((path, delta),) = lora.init(jax.random.key(1), params, x).items()
  adapter = {path: dataclasses.replace(delta, magnitude=2 * delta.magnitude)}
  base = apply_fn(params, x)
  np.testing.assert_allclose(lora.apply(params, adapter, x), 2 * base, rtol=1e-5)
  y = lora.apply(params, adapter, x, lora_dropout_key=jax.random.key(2))
  # An input is dropped, and leaves x W, or doubled, and gives 3 x W.
  ratio = np.asarray(y / base)
  np.testing.assert_allclose(ratio, ratio[:, :1].repeat(4, axis=1), rtol=1e-4)
  assert {*ratio[:, 0].round(3)} == {1.0, 3.0}
