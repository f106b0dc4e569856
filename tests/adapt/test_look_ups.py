"""Weights chosen by index: from stacks, by rows and columns of kernels, of tables."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from tests.adapt.checks import (
  all_equations,
  check_equals_merged,
  check_no_dense_gradient,
  perturbed,
)

ORDER, EXPERT = jnp.array([4, 2, 0, 1, 3]), jnp.array([2, 0, 1, 2, 0])


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def top_two(p, x):
  chosen = jnp.argsort(x[:, :3])[:, :2]
  return jnp.einsum("td,tkdf->tkf", x, p["w"][chosen])


def rematerialised(p, x):
  apply = jax.checkpoint(lambda w, x: jnp.einsum("td,tdf->tf", x, w))
  return apply(p["w"][EXPERT], x)


# name: (function of ({"w": ...}, x), shape of w, shape of x, roles)
PROGRAMS = {
  "columns": (lambda p, x: x @ p["w"][:, ORDER], (6, 5), (3, 6), "in out"),
  "rows": (lambda p, x: x @ p["w"][ORDER], (5, 6), (3, 5), "in out"),
  "rows_transposed": (lambda p, x: x @ p["w"][ORDER].T, (5, 6), (3, 6), "out in"),
  "cast": (
    lambda p, x: x @ p["w"][:, ORDER].astype(jnp.bfloat16).astype(jnp.float32),
    (6, 5),
    (3, 6),
    "in out",
  ),
  "one_of_a_stack": (
    lambda p, x: x @ jnp.take(p["w"], 1, axis=0),
    (3, 6, 5),
    (4, 6),
    "stack in out",
  ),
  "one_of_two_stacks": (
    lambda p, x: x @ p["w"][jnp.array(1)][jnp.argmax(x[0, :2])],
    (3, 2, 6, 5),
    (4, 6),
    "stack stack in out",
  ),
  "expert_of_a_token": (
    lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][EXPERT]),
    (3, 6, 7),
    (5, 6),
    "stack in out",
  ),
  "expert_of_a_vmapped_token": (
    lambda p, x: jax.vmap(lambda x: x @ p["w"][jnp.argmax(x[:3])])(x),
    (3, 6, 7),
    (5, 6),
    "stack in out",
  ),
  "two_experts_of_a_token": (top_two, (3, 6, 7), (5, 6), "stack in out"),
  "rematerialised": (rematerialised, (3, 6, 7), (5, 6), "stack in out"),
  "scalar": (lambda p, x: p["w"][jnp.argmax(x)] * x, (6, 6), (6,), "in out"),
  "vmapped_scalar": (
    lambda p, x: jax.vmap(lambda x: p["w"][jnp.argmax(x)] * x)(x),
    (6, 6),
    (5, 6),
    "in out",
  ),
  "rows_of_a_table_times_a_constant": (
    lambda p, x: jnp.tanh(p["w"][jnp.argmax(x, -1)] @ jnp.ones((6, 4))),
    (6, 6),
    (5, 6),
    "in out",
  ),
  "scores_of_candidates": (
    lambda p, x: jnp.einsum("bd,bkd->bk", x, p["w"][jnp.argsort(x)[:, :2]]),
    (6, 6),
    (5, 6),
    "in out",
  ),
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_what_is_looked_up_equals_merged(name):
  fn, w_shape, x_shape, roles = PROGRAMS[name]
  params, x = {"w": normal(0, *w_shape) * 0.3}, normal(1, *x_shape)
  if name == "cast":
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  adapter = lora.init(jax.random.key(2), params, x)
  assert adapter["w"].roles == tuple(roles.split())
  np.testing.assert_allclose(
    lora.apply(params, adapter, x), fn(params, x), rtol=1e-6, atol=1e-6
  )
  adapter = perturbed(adapter)
  tol = 3e-2 if name == "cast" else 5e-5
  check_equals_merged(lora, fn, params, adapter, x, tol=tol)
  check_no_dense_gradient(lora, params, adapter, x)


@pytest.mark.parametrize("name", ["columns", "rows", "rows_transposed"])
def test_a_picked_kernel_is_never_summed_with_its_delta(name):
  fn, w_shape, x_shape, _ = PROGRAMS[name]
  params, x = {"w": normal(0, *w_shape)}, normal(1, *x_shape)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  adapter = lora.init(jax.random.key(2), params, x)
  jaxpr = jax.make_jaxpr(jax.grad(lambda a: lora.apply(params, a, x).sum()))(adapter)
  names = {
    eqn.primitive.name
    for eqn in all_equations(jaxpr)
    for out in eqn.outvars
    if sorted(out.aval.shape) == sorted(w_shape)
  }
  assert names <= {"gather", "transpose", "jit", "pjit"}, names


def test_chosen_kernels_that_cannot_be_followed_are_an_error():
  fn = lambda p, x: jnp.einsum("td,tdf->tf", x, jnp.tanh(p["w"][EXPERT]))
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  with pytest.raises(lx.LoraxError, match="'w' is used by 'tanh'"):
    lora.plan({"w": normal(0, 3, 6, 7)}, normal(1, 5, 6))


def test_a_stacked_bias_chosen_by_its_layer_is_no_table():
  def fn(p, x):
    layer = lambda i, x: jnp.tanh(x @ p["w"]["kernel"][i] + p["w"]["bias"][i][None])
    return jax.lax.fori_loop(0, 3, layer, x)

  params = {"w": {"kernel": normal(0, 3, 6, 6), "bias": normal(1, 3, 6)}}
  plan = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["w"])).plan(
    params, normal(2, 4, 6)
  )
  assert [t.path for t in plan.targets] == ["w/kernel"]


@pytest.mark.parametrize("vmapped", [False, True])
def test_an_equinox_embedding_is_adapted(vmapped):
  table = eqx.nn.Embedding(11, 6, key=jax.random.key(0))
  fn = lambda table, ids: (jax.vmap(table) if vmapped else table)(ids)
  ids = jnp.array([1, 3, 3]) if vmapped else jnp.array(3)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["weight"]))
  adapter = lora.init(jax.random.key(1), table, ids)
  assert adapter["weight"].roles == ("in", "out")
  check_equals_merged(lora, fn, table, perturbed(adapter), ids)
