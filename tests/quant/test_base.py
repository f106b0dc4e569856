"""A quantised base in the transform: the numbers of its dense kernels, none of them
kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax import quant
from lorax_flax.adapt import algebra
from lorax_flax.adapt.partition import combine, partition, trainable_mask
from tests.adapt.checks import all_equations, perturbed
from tests.methods import peft_methods as peers

LAYERS, D, HIDDEN = 3, 64, 128
X = jax.random.normal(jax.random.key(1), (5, D))


def draw(*shape):
  return jax.random.normal(jax.random.key(sum(shape)), shape) / 8


PARAMS = {
  "up": draw(LAYERS, D, HIDDEN),
  "down": draw(LAYERS, HIDDEN, D),
  "head": draw(D, 7),
}
LISTED = {
  "up": list(PARAMS["up"]),
  "down": list(PARAMS["down"]),
  "head": PARAMS["head"],
}


def layer(x, up, down):
  return x + jnp.tanh(x @ up) @ down


def looped(params, x):
  for up, down in zip(params["up"], params["down"], strict=True):
    x = layer(x, up, down)
  return x @ params["head"]


def scanned(params, x):
  step = lambda x, w: (layer(x, *w), None)
  return jax.lax.scan(step, x, (params["up"], params["down"]))[0] @ params["head"]


def remat(params, x):
  step = jax.checkpoint(lambda x, w: (layer(x, *w), None))
  return jax.lax.scan(step, x, (params["up"], params["down"]))[0] @ params["head"]


def rearranged(params, x):
  """Cast before the scan, and transposed, reshaped and joined in it."""
  cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)

  def step(x, w):
    up, down = w
    up = jnp.concatenate([up[:, :70], up[:, 70:]], 1).T.reshape(2, 64, D)
    y = jnp.einsum("bd,khd->bkh", x.astype(jnp.bfloat16), up).reshape(-1, HIDDEN)
    return x + (jnp.tanh(y) @ down).astype(jnp.float32), None

  x = jax.lax.scan(step, x, (cast["up"], cast["down"]))[0]
  return x @ params["head"]


CASES = {
  "looped": (looped, LISTED),
  "scanned": (scanned, PARAMS),
  "remat": (remat, PARAMS),
  "rearranged": (rearranged, PARAMS),
}


def quantised(params, name):
  """The params with their layers' kernels quantised, and those dense again."""
  layers = {key: params[key] for key in ("up", "down")}
  made = jax.tree.map(lambda w: quant.quantize(w, name), layers)
  q = params | made
  return q, jax.tree.map(quant.dense, q, is_leaf=quant.is_quantized)


def start(case, name, **config):
  fn, params = CASES[case]
  config = {"targets": r"(up|down)(/\d+)?"} | (config or {"rank": 2, "alpha": 3.0})
  lora = lx.adapt(fn, lx.LoraConfig(**config))
  q, dense = quantised(params, name)
  return lora, q, dense, perturbed(lora.init(jax.random.key(2), q, X))


def loss_of(lora, params):
  return lambda adapter, x: jnp.square(lora.apply(params, adapter, x)).sum()


def gradient(lora, params):
  return jax.jit(jax.value_and_grad(loss_of(lora, params), argnums=(0, 1)))


def check_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["int8", "nf4", "fp8"])
def test_logits_and_gradients_are_the_dense_kernels(case, name):
  lora, q, dense, adapter = start(case, name)
  assert lora.plan(q, X).targets == lora.plan(dense, X).targets
  check_equal(*(gradient(lora, params)(adapter, X) for params in (q, dense)))


@pytest.mark.parametrize("case", CASES)
def test_no_dense_kernel_is_kept(case):
  lora, q, dense, adapter = start(case, "nf4")
  sizes = {D * HIDDEN, LAYERS * D * HIDDEN}

  def kept(params):
    """Sizes of the floats that the backward pass takes."""
    pull = lambda adapter, x: jax.vjp(loss_of(lora, params), adapter, x)[1]
    leaves = jax.tree.leaves(jax.eval_shape(pull, adapter, X))
    return sizes & {x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}

  # A cast before a scan is undone: the cast is of each slice.
  assert not kept(q)
  assert kept(dense)  # What this would have found.


def test_the_compiled_step_holds_one_dense_kernel_at_most():
  jax.config.update("jax_disable_most_optimizations", False)
  width, depth = 256, 8
  kernels = [draw(width, width) + i for i in range(depth)]

  def fn(params, x):
    for w in params["w"]:
      x = jnp.tanh(x @ w)
    return x

  x = jnp.ones((2, width))
  lora = lx.adapt(fn, lx.LoraConfig(rank=1, targets=r"w/\d"))
  adapter = lora.init(jax.random.key(0), {"w": kernels}, x)
  q = {"w": [quant.quantize(w, "int8") for w in kernels]}

  def step(params, adapter, x):
    return jax.grad(lambda a: lora.apply(params, a, x).sum())(adapter)

  used = jax.jit(step).lower(q, adapter, x).compile().memory_analysis()
  assert used.temp_size_in_bytes < 3.5 * kernels[0].nbytes
  assert used.argument_size_in_bytes < 0.3 * depth * kernels[0].nbytes


def test_trials_share_the_base():
  lora, q, dense, adapter = start("scanned", "nf4")
  trials = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapter)

  def losses(params):
    return jax.jit(jax.vmap(gradient(lora, params), (0, None)))

  check_equal(losses(q)(trials, X), losses(dense)(trials, X))
  jaxpr = jax.make_jaxpr(losses(q))(trials, X)
  shapes = {v.aval.shape for e in all_equations(jaxpr) for v in e.outvars}
  assert (D, HIDDEN) in shapes
  assert (2, D, HIDDEN) not in shapes  # No kernel is formed for each trial.


def test_a_base_without_an_adapter_runs():
  q, dense = quantised(PARAMS, "int4")
  run = lx.adapt(remat, lx.LoraConfig()).apply
  np.testing.assert_array_equal(run(q, {}, X), run(dense, {}, X))
  with pytest.raises(lx.LoraxError, match=r"lx\.adapt"):
    remat({**q, "head": quant.quantize(draw(64, 64), "int8")}, X)


def turned(params, x):
  """What no delta, and no record of steps, follows."""
  w = params["up"]
  v = jax.lax.cond(x.sum() > 0, lambda w: w * 2.0, lambda w: w.at[0].set(0.0), w)
  y = jax.lax.fori_loop(0, 2, lambda i, x: x + (x @ w) @ w.T, x)
  return jnp.tanh(x @ v) @ jnp.sort(w, 0).T + y @ (params["down"].T @ w.T)


def test_a_frozen_weight_may_go_anywhere():
  q, dense = quantised({"up": draw(D, HIDDEN), "down": draw(HIDDEN, D)}, "nf4")
  run = lx.adapt(turned, lx.LoraConfig()).apply
  got, want = (jax.jit(run)(p, {}, X) for p in (q, dense))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@jax.custom_vjp
def squared(x, w):
  return jnp.square(x @ w)


def _squared(x, w):
  return squared(x, w), (x, w)


squared.defvjp(
  _squared, lambda kept, g: (2 * g * (kept[0] @ kept[1]) @ kept[1].T, None)
)


@jax.custom_jvp
def cubed(x, w):
  return (x @ w) ** 3


@cubed.defjvp
def _cubed(primals, tangents):
  (x, w), (dx, dw) = primals, tangents
  return cubed(x, w), 3 * (x @ w) ** 2 * (dx @ w + x @ dw)


@pytest.mark.parametrize("rule", [squared, cubed])
def test_rules_of_their_own_take_stored_weights(rule):
  fn = lambda params, x: rule(x @ params["down"], params["up"])
  q, dense = quantised({"up": draw(D, HIDDEN), "down": draw(D, D)}, "nf4")
  lora = lx.adapt(fn, lx.LoraConfig(targets="down", rank=2))
  adapter = perturbed(lora.init(jax.random.key(0), q, X))
  check_equal(*(gradient(lora, params)(adapter, X) for params in (q, dense)))


def test_merging_makes_the_targets_dense():
  lora, q, dense, adapter = start("scanned", "int8", targets="up", rank=2)
  merged, expected = lx.merge(q, adapter), lx.merge(dense, adapter)
  np.testing.assert_array_equal(merged["up"], expected["up"])
  assert quant.is_quantized(merged["down"])
  run = lx.adapt(scanned, lx.LoraConfig()).apply
  got = lora.apply(q, adapter, X)
  np.testing.assert_allclose(run(merged, {}, X), got, rtol=1e-3, atol=1e-4)


def test_a_method_of_the_kernels_values_becomes_the_same_lora():
  _, q, dense, adapter = start("scanned", "int8", method="hira", rank=2)
  found, expected = (algebra.as_lora(params, adapter, 4) for params in (q, dense))
  assert {*found.adapter} == {"up", "down"}
  check_equal(found.adapter, expected.adapter)


LORAS = ("lora", "dora", "lora_bias", "fused_lora", "pissa", "olora")
METHODS = {name: {"rank": 2, "alpha": 3.0} for name in LORAS}
METHODS["fused_lora"] |= {"options": {"enable_lora": (True, False)}}
METHODS |= {name: peer.ours for name, peer in peers.PEERS.items() if not peer.method}
METHODS["ia3 of inputs"] = {"method": "ia3", "options": {"feedforward": "down"}}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_nf4(name):
  lora, q, dense, adapter = start("scanned", "nf4", **{"method": name} | METHODS[name])
  trained, rest = partition(adapter, trainable_mask(adapter))

  def value_and_gradients(params):
    loss = lambda trained, x: loss_of(lora, params)(combine(trained, rest), x)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(trained, X)

  got, want = map(value_and_gradients, (q, dense))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_no_method_is_left_out():
  # These look at data to start, and are LoRA from then on.
  names = {fields.get("method", name) for name, fields in METHODS.items()}
  assert peers.kernel_methods() - {"lora_ga", "corda"} == names
