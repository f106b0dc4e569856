"""Contractions, views and calls, one small program each, against merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_flax as lx
from lorax_flax import ragged
from lorax_flax.adapt.interpret import interpreter, look_ups, product_rules
from tests.adapt import test_look_ups
from tests.adapt.checks import (
  all_equations,
  check_equals_merged,
  check_no_dense_gradient,
  perturbed,
)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def conv(strides, padding="SAME", **kwargs):
  layout = ("NWC", "WIO", "NWC") if len(strides) == 1 else ("NHWC", "HWIO", "NHWC")

  def fn(p, x):
    return lax.conv_general_dilated(
      x, p["w"], strides, padding, dimension_numbers=layout, **kwargs
    )

  return fn


def gradient_by_input(fn):
  return lambda p, x: jax.grad(lambda x: jnp.sin(jnp.tanh(fn(p, x))).sum())(x)


def absorbed(p, x):
  """Latent attention: up-projections of keys and values, joined, on the other side."""
  keys, values = p["w"][:, :, :3], p["w"][:, :, 3:]
  q = jnp.einsum("bthd,rhd->bthr", jnp.stack([x[..., :3], x[..., 3:]], 2), keys)
  scores = jax.nn.softmax(jnp.einsum("bthr,bsr->bhts", q, x), -1)
  mixed = jnp.einsum("bhts,bsr->bthr", scores, x)
  return jnp.einsum("bthr,rhv->bthv", mixed, values)


def scan_const(p, x):
  return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3)[0]


def scan_carry(p, x):
  def body(carry, _):
    c, w = carry
    return (jnp.tanh(c @ w), w), None

  return lax.scan(body, (x, p["w"]), None, length=3)[0][0]


def while_const(p, x):
  # Only forward: a while has no reverse-mode gradient.
  step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]))
  return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]


def cond(p, x):
  yes = lambda x: jnp.tanh(x @ p["w"])
  return lax.cond(x.sum() > -1e9, yes, lambda x: 2.0 * (x @ p["w"].T), x)


def sharded(p, x):
  mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
  inner = lambda x, w: lax.psum(x @ w, "d")
  specs = (P(None, "d"), P("d", None))
  return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P())(x, p["w"])


def shards_along(p, x):
  """Steps on a weight's shards inside shard_map, on a mesh of one device."""
  mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

  def inner(x, w):
    w = lax.ppermute(lax.all_gather(w, "d", axis=0, tiled=True), "d", [(0, 0)])
    return lax.psum(x @ w, "d")

  specs = (P(None, "d"), P("d", None))
  return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P())(x, p["w"])


def varying(p, x):
  mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
  inner = lambda x, w: x @ lax.pcast(w, "d", to="varying")
  specs = (P("d"), P())
  return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P("d"))(x, p["w"])


def constrained(p, x):
  mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
  return x @ lax.with_sharding_constraint(p["w"], NamedSharding(mesh, P("d")))


def resharded(p, x):
  mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
  return x @ jax.sharding.reshard(p["w"], NamedSharding(mesh, P("d")))


@jax.custom_batching.custom_vmap
def doubled(w):
  return 2.0 * w


@doubled.def_vmap
def _(axis_size, in_batched, w):
  return doubled(w), in_batched[0]


def stacked_lists(p, x):
  """A list of layers stacked inside the function, then scanned."""
  ws = jnp.stack([p["w"], 2.0 * p["w"]])
  return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws)[0]


# name: (function of ({"w": ...}, x), shape of w, shape of x, roles)
PROGRAMS = {
  "right": (lambda p, x: x @ p["w"], (5, 7), (3, 5), "in out"),
  "left": (lambda p, x: p["w"] @ x, (7, 5), (5, 3), "out in"),
  "transposed": (lambda p, x: x @ p["w"].T, (7, 5), (3, 5), "out in"),
  "vector": (lambda p, x: x @ p["w"], (5, 7), (5,), "in out"),
  "size_one_in": (lambda p, x: x @ p["w"], (1, 7), (3, 1), "in out"),
  "size_one_out": (lambda p, x: x @ p["w"], (5, 1), (3, 5), "in out"),
  "two_contracted": (
    lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"]),
    (3, 4, 5),
    (2, 6, 3, 4),
    "in in out",
  ),
  "two_kept": (
    lambda p, x: jnp.einsum("btd,dhk->bhtk", x, p["w"]),
    (5, 3, 4),
    (2, 6, 5),
    "in out out",
  ),
  "kept_around": (
    lambda p, x: jnp.einsum("bd,hdk->hbk", x, p["w"]),
    (3, 5, 4),
    (2, 5),
    "out in out",
  ),
  "batched": (
    lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
    (3, 5, 4),
    (3, 2, 5),
    "stack in out",
  ),
  "ragged": (
    lambda p, x: ragged.product(x, p["w"], jnp.array([2, 0, 4])),
    (3, 5, 4),
    (7, 5),
    "stack in out",
  ),
  "ragged_one_group": (
    lambda p, x: ragged.product(x, p["w"], jnp.array([4])),
    (1, 5, 4),
    (7, 5),
    "stack in out",
  ),
  "ragged_turned_and_scanned": (
    lambda p, x: lax.scan(
      lambda c, w: (
        jnp.tanh(ragged.product(c, w, jnp.array([2, 0, 5]), turned=True)),
        None,
      ),
      x,
      p["w"],
    )[0],
    (2, 3, 5, 5),
    (7, 5),
    "stack stack out in",
  ),
  "batched_last": (
    lambda p, x: jnp.einsum("bed,dfe->bef", x, p["w"]),
    (5, 4, 3),
    (2, 3, 5),
    "in out stack",
  ),
  "reshaped": (
    lambda p, x: x @ p["w"].reshape(5, 12),
    (5, 3, 4),
    (2, 5),
    "in out out",
  ),
  "reshaped_apart": (
    lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(5, 3, 4)),
    (5, 12),
    (2, 5),
    "in out",
  ),
  "sliced_and_joined": (
    lambda p, x: (
      x @ jnp.concatenate([p["w"][:, 2:], jnp.ones((5, 2)), -p["w"]], axis=1)
    ),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "joined_with_itself_on_in": (
    lambda p, x: x @ jnp.concatenate([p["w"], p["w"] * 0.5], axis=0),
    (5, 7),
    (3, 10),
    "in out",
  ),
  "split": (
    lambda p, x: sum(x @ w for w in jnp.split(p["w"], [2, 4], axis=1)[:1]),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "scaled": (lambda p, x: x @ (p["w"] / 3.0 * 2.0), (5, 7), (3, 5), "in out"),
  "expanded": (
    lambda p, x: jnp.matmul(x, p["w"][None, :, :]),
    (5, 7),
    (1, 3, 5),
    "in out",
  ),
  "absorbed_both_ways": (absorbed, (6, 2, 7), (2, 5, 6), "out stack in"),
  "loop_over_stack": (
    lambda p, x: jnp.tanh(x @ p["w"][0]) @ p["w"][1],
    (2, 5, 5),
    (3, 5),
    "stack in out",
  ),
  "dynamic_layer": (
    lambda p, x: lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c @ p["w"][i]), x),
    (2, 5, 5),
    (3, 5),
    "stack in out",
  ),
  "look_up": (
    lambda p, x: p["w"][jnp.array([[1, 3, 3], [0, 10, -1]])] * x,
    (11, 5),
    (2, 3, 5),
    "in out",
  ),
  "tied": (
    lambda p, x: jnp.tanh(p["w"][jnp.array([1, 3, 10])] * x) @ p["w"].T,
    (11, 5),
    (3, 5),
    "in out",
  ),
  "conv_1d": (conv((2,)), (3, 5, 7), (2, 9, 5), "in in out"),
  "conv_2d": (conv((1, 2), "VALID"), (3, 2, 5, 7), (2, 9, 8, 5), "in in in out"),
  "conv_dilated": (
    conv((1, 1), rhs_dilation=(2, 3)),
    (3, 2, 5, 7),
    (2, 9, 8, 5),
    "in in in out",
  ),
  "conv_grouped": (
    conv((1, 1), feature_group_count=2),
    (3, 3, 4, 6),
    (2, 7, 5, 8),
    "in in in out",
  ),
  "conv_vmapped": (
    lambda p, x: jax.vmap(lambda x, w: conv((1, 1))({"w": w}, x))(x, p["w"]),
    (2, 3, 2, 4, 5),
    (2, 3, 6, 7, 4),
    "out in in in out",
  ),
  "conv_gradient_by_the_input": (
    gradient_by_input(conv((2, 1), "VALID")),
    (3, 2, 4, 5),
    (2, 7, 6, 4),
    "in in in out",
  ),
  "conv_transposed": (
    lambda p, x: lax.conv_transpose(x, p["w"], (2,), "SAME"),
    (3, 5, 7),
    (2, 4, 5),
    "in in out",
  ),
  "jit": (
    lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "remat": (
    lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "scan_const": (scan_const, (5, 5), (3, 5), "in out"),
  "scan_carry": (scan_carry, (5, 5), (3, 5), "in out"),
  # The branch not taken comes first, and multiplies by the transpose.
  "cond": (cond, (5, 5), (3, 5), "out in"),
  "shard_map": (sharded, (5, 7), (3, 5), "in out"),
  "stacked_lists": (stacked_lists, (5, 5), (3, 5), "in out"),
  "vmapped": (
    lambda p, x: jax.vmap(lambda x: x @ p["w"])(x),
    (5, 7),
    (2, 3, 5),
    "in out",
  ),
  "shards": (shards_along, (5, 7), (3, 5), "in out"),
  "varying": (varying, (5, 7), (3, 5), "in out"),
  "constrained": (constrained, (5, 7), (3, 5), "in out"),
  "resharded": (resharded, (5, 7), (3, 5), "in out"),
  "barrier": (
    lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"]))),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "named": (
    lambda p, x: x @ checkpoint_name(jnp.copy(p["w"]), "w"),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "tiled": (
    lambda p, x: jnp.tanh(x @ jnp.tile(p["w"], (2, 3))),
    (5, 7),
    (3, 10),
    "in out",
  ),
  "plus_a_constant": (
    lambda p, x: jnp.tanh(x @ (2.0 - (p["w"] + jnp.eye(6)))),
    (6, 6),
    (3, 6),
    "in out",
  ),
  "running_sum_of_inputs": (
    lambda p, x: jnp.tanh(x @ jnp.cumsum(p["w"], 0)),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "running_sum_of_outputs": (
    lambda p, x: jnp.tanh(x @ lax.cumsum(p["w"], 1, reverse=True)),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "times_a_constant_for_each_input": (
    lambda p, x: x @ (jnp.arange(1.0, 6.0)[:, None] * p["w"]),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "times_constants_for_each_output": (
    lambda p, x: x @ (p["w"] / jnp.arange(1.0, 8.0)[None] * jnp.full((5, 7), 2.0)),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "times_constants_for_experts_and_outputs": (
    lambda p, x: jnp.einsum(
      "ebd,edf->ebf", x, p["w"] * jnp.arange(1.0, 13.0).reshape(3, 1, 4)
    ),
    (3, 5, 4),
    (3, 2, 5),
    "stack in out",
  ),
  "pruned_inputs": (
    lambda p, x: x @ jnp.where(jnp.arange(5)[:, None] % 2 == 0, p["w"], 0.5),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "pruned_outputs": (
    lambda p, x: x @ jnp.where(jnp.arange(7)[None] % 2 == 0, 0.0, p["w"]),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "pruned_as_scanned": (
    lambda p, x: lax.scan(
      lambda c, w: (
        jnp.tanh(c @ (w * (jnp.arange(5.0) > 1).astype(float)[None])),
        None,
      ),
      x,
      p["w"],
    )[0],
    (2, 5, 5),
    (3, 5),
    "stack in out",
  ),
  "reversed_and_padded": (
    lambda p, x: x @ jnp.pad(lax.rev(p["w"], (0, 1)), ((1, 0), (0, 2))),
    (5, 7),
    (3, 6),
    "in out",
  ),
  "reduced_precision": (
    lambda p, x: x @ lax.reduce_precision(p["w"], 8, 23),
    (5, 7),
    (3, 5),
    "in out",
  ),
  "conv_depthwise": (
    conv((1, 1), feature_group_count=8),
    (3, 3, 1, 16),
    (2, 7, 5, 8),
    "in in in out",
  ),
  "bfloat16_cast_back": (
    lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32),
    (5, 7),
    (3, 5),
    "in out",
  ),
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_program_equals_merged(name):
  fn, w_shape, x_shape, roles = PROGRAMS[name]
  params, x = {"w": normal(0, *w_shape) * 0.3}, normal(1, *x_shape)
  if name == "bfloat16_cast_back":  # a base that bfloat16 holds, and factors too
    params = {"w": params["w"].astype(jnp.bfloat16).astype(jnp.float32)}
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  adapter = lora.init(jax.random.key(2), params, x)
  assert adapter["w"].roles == tuple(roles.split())
  # XLA fuses a compiled loop in its own way, with its own rounding.
  loops = (
    "dynamic_layer",
    "ragged_turned_and_scanned",
    "pruned_as_scanned",
    "stacked_lists",
    "scan_const",
    "scan_carry",
  )
  exact = 1e-6 if name in loops else 0.0
  np.testing.assert_allclose(
    lora.apply(params, adapter, x), fn(params, x), rtol=exact, atol=exact
  )
  adapter = perturbed(adapter)
  tol = 3e-2 if name == "bfloat16_cast_back" else 5e-5
  check_equals_merged(lora, fn, params, adapter, x, tol=tol)
  # A depthwise kernel is smaller than the activations of its factors: it is formed.
  if "size_one" not in name and name not in ("split", "conv_depthwise"):
    check_no_dense_gradient(lora, params, adapter, x)


# In the tables for other releases of JAX, or what has a test of its own elsewhere.
ELSEWHERE = {
  "checkpoint", "closed_call", "copy", "copy_p", "core_call", "custom_jvp_call",
  "custom_vjp_call", "custom_vmap_call", "pcast", "pjit", "pvary", "reduce_sum",
  "remat2", "stack", "stop_gradient", "unstack", "while",
}  # fmt: skip


def test_every_rule_has_a_program():
  met = set()
  for fn, w_shape, x_shape, _ in [*PROGRAMS.values(), *test_look_ups.PROGRAMS.values()]:
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (w_shape, x_shape))
    jaxpr = jax.make_jaxpr(fn)({"w": w}, x)
    met |= {eqn.primitive.name for eqn in all_equations(jaxpr)}
  rules = {*look_ups.RULES, *product_rules.RULES, *interpreter.CALL_RULES}
  assert rules - met <= ELSEWHERE, rules - met - ELSEWHERE


def test_depthwise_kernels_are_formed_and_left_out_of_all_linear():
  fn, w_shape, x_shape, _ = PROGRAMS["conv_depthwise"]
  params = {"w": normal(0, *w_shape), "up": normal(1, 16, 5), "head": normal(2, 5, 3)}
  x = normal(3, *x_shape)
  both = lambda p, x: jnp.tanh(fn(p, x) @ p["up"]) @ p["head"]
  plan = lx.adapt(both, lx.LoraConfig(targets="all-linear")).plan(params, x)
  assert [t.path for t in plan.targets] == ["up"]

  def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

  lora = lx.adapt(fn, lx.LoraConfig(rank=8, targets=["w"]))
  adapter = lora.init(jax.random.key(2), params, x)
  ratio = flops(lora.apply, params, adapter, x) / flops(fn, params, x)
  assert ratio < 2.5, ratio


def test_a_function_with_a_vmap_rule_of_its_own_is_entered():
  # JAX has no reverse-mode gradient of it; the adapter's is taken inside.
  params, x = {"w": normal(0, 5, 7)}, normal(1, 3, 5)
  fn = lambda p, x: x @ doubled(p["w"])
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  adapter = perturbed(lora.init(jax.random.key(2), params, x))
  want = fn(lx.merge(params, adapter), x)
  np.testing.assert_allclose(lora.apply(params, adapter, x), want, rtol=1e-5, atol=1e-5)


ALL = jnp.arange(35.0).reshape(5, 7)
NOT_LINEAR_ENOUGH = {
  "masked": (lambda w, x: x @ jnp.where(ALL % 2 == 0, w, 0.0), "select_n"),
  "chosen": (lambda w, x: x @ jnp.where(ALL % 2 == 0, w, 2.0 * w), "select_n"),
  "scaled": (lambda w, x: x @ (w * ALL), "mul"),
  "scaled_by_data": (lambda w, x: x @ (w * x[0][:, None]), "mul"),
  "batched": (lambda w, x: ((x[:, :, None] + ALL[None]) * w[None]).sum(1), "mul"),
  "normalised": (lambda w, x: x @ (w / jnp.sqrt((w * w).sum(0, keepdims=True))), "mul"),
  "quotient": (lambda w, x: x @ (1.0 / w), "div"),
}


@pytest.mark.parametrize("name", list(NOT_LINEAR_ENOUGH))
def test_a_step_that_no_low_rank_delta_survives_is_refused_by_the_plan(name):
  step, primitive = NOT_LINEAR_ENOUGH[name]
  params, x = {"w": normal(0, 5, 7), "v": normal(1, 7, 4)}, normal(2, 3, 5)
  fn = lambda p, x: jnp.tanh(step(p["w"], x)) @ p["v"]
  named = lx.adapt(fn, lx.LoraConfig(targets="w"))
  with pytest.raises(lx.LoraxError, match=f"'w' is used by '{primitive}'"):
    named.plan(params, x)
  plan = lx.adapt(lambda p, x: fn(p, x) @ p["h"], lx.LoraConfig(targets="all-linear"))
  plan = plan.plan(params | {"h": normal(3, 4, 2)}, x)
  assert [t.path for t in plan.targets] == ["v"]
  assert "w" in plan.left_out


def test_a_step_whose_result_nobody_uses_is_left_out():
  def fn(p, x):
    jnp.concatenate([p["w"].reshape(-1), jnp.ones(2)])
    return jnp.tanh(x @ p["w"]) @ p["v"]

  params, x = {"w": normal(0, 5, 7), "v": normal(1, 7, 4)}, normal(2, 3, 5)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="all-linear"))
  adapter = perturbed(lora.init(jax.random.key(2), params, x))
  check_equals_merged(lora, fn, params, adapter, x)


def test_a_token_that_is_joined_to_the_data_is_no_kernel():
  def fn(p, x):
    x = jnp.concatenate([p["token"], x]) + p["bias"]
    return jnp.tanh(x @ p["w"]) @ p["v"]

  params = {"w": normal(0, 5, 7), "v": normal(1, 7, 4)}
  params |= {"token": normal(2, 1, 5), "bias": normal(3, 1, 5)}
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="all-linear"))
  plan = lora.plan(params, normal(4, 3, 5))
  assert [t.path for t in plan.targets] == ["w"]
  assert plan.heads == ("v",)


def test_a_stopped_gradient_stops_that_of_the_delta():
  fn = lambda p, x: jnp.tanh(x @ lax.stop_gradient(p["w"])) @ p["w"].T
  params, x = {"w": normal(0, 5, 7)}, normal(1, 3, 5)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  adapter = perturbed(lora.init(jax.random.key(2), params, x))
  check_equals_merged(lora, fn, params, adapter, x)
  check_no_dense_gradient(lora, params, adapter, x)


def test_a_weight_in_a_sum_with_data_is_no_kernel():
  fn = lambda p, x: jnp.tanh((x + p["w"]) @ jnp.ones((6, 4)))
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  with pytest.raises(lx.LoraxError, match="'w' is used by 'add'"):
    lora.plan({"w": normal(0, 3, 6)}, normal(1, 3, 6))


def test_a_while_loop_is_entered():
  params, x = {"w": normal(0, 5, 5) * 0.3}, normal(1, 3, 5)
  lora = lx.adapt(while_const, lx.LoraConfig(rank=2, targets="w"))
  adapter = perturbed(lora.init(jax.random.key(2), params, x))
  want = while_const(lx.merge(params, adapter), x)
  np.testing.assert_allclose(lora.apply(params, adapter, x), want, rtol=1e-5, atol=1e-5)


def test_remat_keeps_its_policy():
  policy = jax.checkpoint_policies.dots_saveable

  def fn(p, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy)(p["w"], x)

  params, x = {"w": normal(0, 5, 7)}, normal(1, 3, 5)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  adapter = lora.init(jax.random.key(2), params, x)
  jaxpr = jax.make_jaxpr(lambda a: lora.apply(params, a, x))(adapter)
  (remat,) = [
    e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("remat2", "checkpoint")
  ]
  assert remat.params["policy"] is not None


def test_a_loop_over_an_array_is_one_over_its_places():
  """Newer versions of JAX have a primitive for it."""

  def iterated(p, x):
    for w in p["w"]:
      x = jnp.tanh(x @ w)
    return x

  def indexed(p, x):
    for i in range(3):
      x = jnp.tanh(x @ p["w"][i])
    return x

  params = {"w": jax.random.normal(jax.random.key(0), (3, 6, 6)) / 2}
  x = jax.random.normal(jax.random.key(1), (4, 6))
  config = lx.LoraConfig(targets="w", rank=2, dropout=0.5)
  found = []
  for fn in (iterated, indexed):
    lora = lx.adapt(fn, config)
    adapter = perturbed(lora.init(jax.random.key(2), params, x))
    run = lambda adapter, lora=lora: jnp.sum(
      lora.apply(params, adapter, x, lora_dropout_key=jax.random.key(3)) ** 2
    )
    found.append(jax.value_and_grad(run)(adapter))
  for got, want in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
