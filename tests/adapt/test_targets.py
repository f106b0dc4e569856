"""Which weights a config means, and what it says when it means none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten


class Model(nn.Module):
  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(11, 6, name="embed")(ids)
    for i in range(3):
      y = nn.LayerNorm(name=f"norm_{i}")(x)
      y = nn.MultiHeadDotProductAttention(num_heads=2, name=f"attention_{i}")(y, y)
      x = x + nn.Dense(6, name=f"down_{i}")(jnp.tanh(nn.Dense(7, name=f"up_{i}")(y)))
    return nn.Dense(3, name="head")(x)


IDS = jnp.zeros((2, 4), jnp.int32)


@pytest.fixture(scope="module")
def model():
  module = Model()
  params = module.init(jax.random.key(0), IDS)["params"]
  return lambda p, ids: module.apply({"params": p}, ids), params


def plan(model, **kwargs):
  apply_fn, params = model
  return lx.adapt(apply_fn, lx.LoraConfig(**kwargs)).plan(params, IDS)


def paths(model, **kwargs):
  return {t.path for t in plan(model, **kwargs).targets}


def test_all_linear_is_every_contraction_but_the_head_and_the_embedding(model):
  found = plan(model, targets="all-linear")
  names = ["attention_{}/query", "attention_{}/key", "attention_{}/value"]
  names += ["attention_{}/out", "up_{}", "down_{}"]
  want = {f"{name.format(i)}/kernel" for i in range(3) for name in names}
  assert {t.path for t in found.targets} == want
  assert found.heads == ("head/kernel",)


def test_a_model_without_a_head_keeps_its_last_layer():
  def fn(p, x):
    for w in ("a", "b"):
      x = x + jnp.tanh(x @ p[w])
    return x

  params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
  found = lx.adapt(fn, lx.LoraConfig()).plan(params, jnp.ones((1, 3)))
  assert {t.path for t in found.targets} == {"a", "b"}
  assert not found.heads


def test_a_string_is_a_regular_expression_for_the_whole_path(model):
  want = {f"attention_{i}/{n}/kernel" for i in range(3) for n in ("query", "value")}
  assert paths(model, targets=r".*/(query|value)/kernel") == want
  with pytest.raises(lx.LoraxError, match="matches nothing"):
    paths(model, targets=r"(query|value)/kernel")


def test_a_list_holds_suffixes_of_paths_or_modules(model):
  want = {f"attention_{i}/query/kernel" for i in range(3)} | {"up_1/kernel"}
  assert paths(model, targets=["query", "up_1/kernel"]) == want


def test_an_excluded_target_is_left_out(model):
  left = paths(model, targets=["query"], exclude=["attention_1/query"])
  assert left == {"attention_0/query/kernel", "attention_2/query/kernel"}


def test_layers_select_by_the_first_number(model):
  def fn(p, x):
    return x @ p["layers"]["0"]["w"] @ p["layers"]["1"]["w"]

  params = {"layers": {str(i): {"w": jnp.ones((3, 3))} for i in range(2)}}
  lora = lx.adapt(fn, lx.LoraConfig(targets=["w"], layers=[1]))
  found = lora.plan(params, jnp.ones((1, 3)))
  assert [t.path for t in found.targets] == ["layers/1/w"]
  with pytest.raises(lx.LoraxError, match=r"no target is in \[5\]"):
    lx.adapt(fn, lx.LoraConfig(targets=["w"], layers=[5])).plan(
      params, jnp.ones((1, 3))
    )


def test_layers_of_a_stacked_weight_have_factors_of_their_own():
  def fn(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

  params, x = {"w": jax.random.normal(jax.random.key(0), (4, 3, 3))}, jnp.ones((2, 3))
  key = jax.random.key(1)
  some = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w", layers=[1, 3]))
  adapter = some.init(key, params, x)
  assert adapter["w"].a.shape == (2, 3, 2)
  whole = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w")).init(key, params, x)
  np.testing.assert_array_equal(adapter["w"].a, whole["w"].a[jnp.array([1, 3])])
  delta = lx.LoRA(
    adapter["w"].a, adapter["w"].b + 1.0, adapter["w"].scale, ("stack", "in", "out"),
    layers=(1, 3),
  )  # fmt: skip
  merged = lx.merge(params, {"w": delta})["w"]
  moved = jnp.any(merged != params["w"], axis=(1, 2))
  assert moved.tolist() == [False, True, False, True]
  np.testing.assert_allclose(
    some.apply(params, {"w": delta}, x), fn({"w": merged}, x), atol=1e-6
  )


def test_rank_and_alpha_follow_their_patterns(model):
  found = plan(
    model,
    targets=["query", "value"],
    rank=4,
    alpha=8,
    rank_pattern={"attention_1/query": 2},
    alpha_pattern={"value": 3.0},
  )
  by_path = {t.path: t for t in found.targets}
  assert by_path["attention_1/query/kernel"].rank == 2
  assert by_path["attention_0/query/kernel"].scale == 2.0
  assert by_path["attention_0/value/kernel"].scale == 0.75
  with pytest.raises(lx.LoraxError, match="'quary' matches no target"):
    plan(model, targets=["query"], rank_pattern={"quary": 2})


def test_rslora_scales_by_the_root_of_the_rank(model):
  (first, *_) = plan(model, targets=["query"], rank=4, alpha=6, use_rslora=True).targets
  assert first.scale == 3.0


def test_tuned_names_whole_modules_and_wins_over_targets(model):
  found = plan(model, targets=["up_0", "up_1"], tuned=["head", "up_1"])
  assert [t.path for t in found.targets] == ["up_0/kernel"]
  assert set(found.tuned) == {"head/kernel", "head/bias", "up_1/kernel", "up_1/bias"}


@pytest.mark.parametrize(
  ("bias", "count"), [("none", 0), ("lora_only", 3), ("all", 22)]
)
def test_biases_are_trained_as_asked(model, bias, count):
  assert len(plan(model, targets=["query"], bias=bias).tuned) == count


def test_everything_tuned_is_full_fine_tuning(model):
  found = plan(model, targets=(), tuned=".*")
  assert not found.targets
  assert set(found.tuned) == set(flatten(model[1]))


def test_a_pattern_that_matches_nothing_names_the_nearest(model):
  with pytest.raises(lx.LoraxError, match=r"'quary' matches nothing.*query"):
    plan(model, targets=["query", "quary"])
  with pytest.raises(lx.LoraxError, match="tuned: 'haed' matches nothing"):
    plan(model, targets=["query"], tuned=["haed"])
  with pytest.raises(lx.LoraxError, match="exclude: 'nope' matches nothing"):
    plan(model, targets=["query"], exclude=["nope"])


def test_a_target_that_nothing_consumes_is_an_error(model):
  with pytest.raises(lx.LoraxError, match=r"'norm_0/scale' is used by '\w+'"):
    plan(model, targets="norm_0/scale")
  fn = lambda p, x: x @ p["used"]
  params = {"used": jnp.ones((3, 3)), "idle": jnp.ones((3, 3))}
  with pytest.raises(lx.LoraxError, match="'idle' is never used"):
    lx.adapt(fn, lx.LoraConfig(targets="idle")).plan(params, jnp.ones((1, 3)))


def test_materialize_forms_the_sum_only_when_asked():
  fn = lambda p, x: x @ jnp.exp(p["w"])
  params, x = {"w": jnp.ones((3, 4))}, jnp.ones((2, 3))
  with pytest.raises(lx.LoraxError, match="'w' is used by 'exp'"):
    lx.adapt(fn, lx.LoraConfig(targets="w")).init(jax.random.key(0), params, x)
  config = lx.LoraConfig(targets="w", on_unsupported="materialize", rank=2)
  lora = lx.adapt(fn, config)
  assert lora.plan(params, x).targets[0].materialized == ("exp",)
  assert "W + delta formed at exp" in str(lora.plan(params, x))
  adapter = lora.init(jax.random.key(0), params, x)
  adapter = {"w": lx.LoRA(adapter["w"].a, adapter["w"].b + 0.1, *_rest(adapter["w"]))}
  np.testing.assert_allclose(
    lora.apply(params, adapter, x), fn(lx.merge(params, adapter), x), rtol=1e-6
  )


def _rest(delta):
  return delta.scale, delta.roles, delta.dropout


def test_an_adapter_for_another_model_is_an_error(model):
  apply_fn, params = model
  lora = lx.adapt(apply_fn, lx.LoraConfig(targets=["query"]))
  adapter = lora.init(jax.random.key(0), params, IDS)
  wrong = {"attention_0/quary/kernel": adapter["attention_0/query/kernel"]}
  with pytest.raises(lx.LoraxError, match=r"did you mean 'attention_0/query/kernel'"):
    lora.apply(params, wrong, IDS)
  with pytest.raises(lx.LoraxError, match=r"did you mean 'attention_0/query/kernel'"):
    lx.merge(params, wrong)
  misfit = {"up_0/kernel": adapter["attention_0/query/kernel"]}
  with pytest.raises(lx.LoraxError, match="'up_0/kernel'"):
    lora.apply(params, misfit, IDS)


def test_a_delta_that_this_call_never_uses_is_an_error():
  fn = lambda p, x, second=False: x @ p["b"] if second else x @ p["a"]
  params, x = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}, jnp.ones((1, 3))
  lora = lx.adapt(fn, lx.LoraConfig(targets="a"))
  adapter = lora.init(jax.random.key(0), params, x)
  with pytest.raises(lx.LoraxError, match="'a' is never used"):
    lora.apply(params, adapter, x, second=True)
  # Unless the function is known to compute a part of a model.
  adapter["a"] = lx.LoRA(adapter["a"].a, adapter["a"].b + 0.1, *_rest(adapter["a"]))
  part = lora.apply_part(params, adapter, x, second=True)
  np.testing.assert_array_equal(part, x @ params["b"])
  whole = lora.apply_part(params, adapter, x)
  np.testing.assert_array_equal(whole, lora.apply(params, adapter, x))
  with pytest.raises(lx.LoraxError, match="unknown adapter path 'c'"):
    lora.apply_part(params, {"c": adapter["a"]}, x)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"rank": 0}, "rank of 'rank'"),
    ({"alpha": -1.0}, "alpha of 'alpha'"),
    ({"dropout": 1.0}, "dropout"),
    ({"bias": "lora"}, "did you mean 'lora_only'"),
    ({"targets": "(("}, "not a regular expression"),
    ({"layers_pattern": "x"}, "does nothing without layers"),
  ],
)
def test_a_bad_config_says_what_is_wrong(kwargs, message):
  with pytest.raises(lx.LoraxError, match=message):
    lx.LoraConfig(**kwargs)
