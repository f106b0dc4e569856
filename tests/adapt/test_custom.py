"""Functions with a derivative rule of their own: the rule is what counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_flax as lx
from tests.adapt.checks import (
  check_equals_merged,
  check_no_dense_gradient,
  grad_of_trained,
  perturbed,
)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def rule(f, fwd, bwd):
  f = jax.custom_vjp(f)
  f.defvjp(fwd, bwd)
  return f


def matmul(to_x, to_w):
  """x @ w whose gradients are what `to_x` and `to_w` make of (x, w, dy)."""
  return rule(
    lambda x, w: x @ w,
    lambda x, w: (x @ w, (x, w)),
    lambda kept, dy: (to_x(*kept, dy), to_w(*kept, dy)),
  )


def back_x(x, w, dy):
  return dy @ w.T


def back_w(x, w, dy):
  return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


true = matmul(back_x, back_w)
clipped = matmul(lambda x, w, dy: jnp.clip(dy, -0.1, 0.1) @ w.T, back_w)
doubled = matmul(back_x, lambda x, w, dy: 2.0 * back_w(x, w, dy) / 3.0)
dx_lies = matmul(lambda x, w, dy: jnp.ones_like(x), back_w)
nonlinear = matmul(back_x, lambda x, w, dy: back_w(x, w, jnp.tanh(3.0 * dy)))
turned = matmul(back_x, lambda x, w, dy: (dy.T @ x).T)
summed = matmul(
  back_x,
  lambda x, w, dy: jnp.einsum("bi,bo->bio", x, dy).sum(0),
)
in_two = matmul(back_x, lambda x, w, dy: -(x[:2].T @ dy[:2]) + 0.5 * (x[2:].T @ dy[2:]))
in_stretches = matmul(
  back_x,
  lambda x, w, dy: jnp.concatenate([x.T @ dy[:, :3], 3.0 * (x.T @ dy[:, 3:])], 1),
)
one_by_one = matmul(
  back_x, lambda x, w, dy: jax.vmap(lambda x, dy: x[:, None] @ dy[None])(x, dy).sum(0)
)
narrow = matmul(
  back_x,
  lambda x, w, dy: back_w(x.astype(jnp.bfloat16), w, dy.astype(jnp.bfloat16)).astype(
    jnp.float32
  ),
)
reshaped = rule(
  lambda x, w: jnp.einsum("bd,dhk->bhk", x, w),
  lambda x, w: (jnp.einsum("bd,dhk->bhk", x, w), (x, w)),
  lambda kept, dy: (
    jnp.einsum("bhk,dhk->bd", dy, kept[1]),
    (kept[0].T @ dy.reshape(dy.shape[0], -1)).reshape(kept[1].shape),
  ),
)
scored = rule(
  lambda w, ids: w[ids],
  lambda w, ids: (w[ids], (w, ids)),
  lambda kept, dy: (2.0 * jnp.zeros_like(kept[0]).at[kept[1]].add(dy), None),
)


@jax.custom_jvp
def lenient(x, w):
  return x @ w


@lenient.defjvp
def _lenient(primals, tangents):
  (x, w), (dx, dw) = primals, tangents
  return x @ w, 3.0 * (dx @ w) + 0.5 * (x @ dw)


def cross_entropy(x, table, labels):
  """The loss of a linear layer, fused with it: the logits' gradient is never kept."""

  @jax.custom_vjp
  def loss(x, table):
    return forward(x, table)[0]

  def forward(x, table):
    logits = x @ table.T
    picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return (jax.nn.logsumexp(logits, -1) - picked).sum(), (x, table)

  def backward(kept, d):
    x, table = kept
    p = jax.nn.softmax(x @ table.T) - jax.nn.one_hot(labels, table.shape[0])
    return d * p @ table, d * (p.T @ x)

  loss.defvjp(forward, backward)
  return loss(x, table)


def scanned(p, x):
  return lax.scan(lambda c, w: (clipped(jnp.tanh(c), w), None), x, p["w"])[0]


def remat(p, x):
  return jax.checkpoint(lambda x, w: clipped(jnp.tanh(x), w))(x, p["w"])


# name: (function of ({"w": ...}, x), shape of w)
PROGRAMS = {
  "true": (lambda p, x: true(x, p["w"]), (5, 7)),
  "clipped": (lambda p, x: clipped(x * 2.0, p["w"]), (5, 7)),
  "transposed": (lambda p, x: clipped(x * 2.0, p["w"].T), (7, 5)),
  "doubled": (lambda p, x: doubled(x, p["w"]), (5, 7)),
  "dx_lies": (lambda p, x: dx_lies(jnp.sin(x), p["w"]), (5, 7)),
  "nonlinear_in_dy": (lambda p, x: nonlinear(x, p["w"]), (5, 7)),
  "turned": (lambda p, x: turned(x, p["w"]), (5, 7)),
  "summed_over_the_batch": (lambda p, x: summed(x, p["w"]), (5, 7)),
  "in_two": (lambda p, x: in_two(x, p["w"]), (5, 7)),
  "in_stretches": (lambda p, x: in_stretches(x, p["w"]), (5, 7)),
  "one_by_one": (lambda p, x: one_by_one(x, p["w"]), (5, 7)),
  "reshaped": (lambda p, x: reshaped(x, p["w"]), (5, 3, 4)),
  "vmapped": (lambda p, x: jax.vmap(lambda x: true(x, p["w"]))(x[:, None]), (5, 7)),
  "stacked": (lambda p, x: jax.vmap(clipped)(x[:2, None], p["w"]), (2, 5, 7)),
  "scanned": (scanned, (2, 5, 5)),
  "remat": (remat, (5, 7)),
  "jit": (lambda p, x: jax.jit(clipped)(x, p["w"]), (5, 7)),
  "looked_up": (lambda p, x: scored(p["w"], jnp.array([1, 3, 3, 0])) * x, (11, 5)),
  "tangent": (lambda p, x: lenient(jnp.sin(x), p["w"]), (5, 7)),
  "cross_entropy": (
    lambda p, x: cross_entropy(x, p["w"], np.array([1, 3, 3, 0])),
    (11, 5),
  ),
}
X = normal(1, 4, 5)


@pytest.mark.parametrize("name", list(PROGRAMS))
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_rule_is_followed_as_with_merged_weights(name, use_dora):
  fn, shape = PROGRAMS[name]
  params = {"w": normal(0, *shape) * 0.5}
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w", use_dora=use_dora))
  adapter = perturbed(lora.init(jax.random.key(2), params, X))
  if use_dora:
    # The norm is kept out of the gradient, which merged weights cannot say.
    fn_merged = detached(fn, params)
    got, want = grads(lora, fn_merged, params, adapter)
    jax.tree.map(close, got, want)
  else:
    check_equals_merged(lora, fn, params, adapter, X)
  check_no_dense_gradient(lora, params, adapter, X)
  check_gradient_of_x(lora, fn, params, adapter)


def close(x, y):
  np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


def detached(fn, params):
  def loss(adapter):
    delta = adapter["w"]
    w = params["w"] + delta.delta(params["w"].shape)
    ins = tuple(i for i, role in enumerate(delta.roles) if role == "in")
    norm = jnp.sqrt((lax.stop_gradient(w) ** 2).sum(ins, keepdims=True))
    magnitude = jnp.expand_dims(delta.magnitude, ins)
    return jnp.sin(fn({"w": magnitude / norm * w}, X)).sum()

  return loss


def grads(lora, loss, params, adapter):
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  ours, _ = grad_of_trained(lora, params, adapter, X)
  want = jax.jit(jax.value_and_grad(lambda t: loss(lx.combine(t, rest))))(trained)
  return jax.jit(jax.value_and_grad(ours))(trained), want


def check_gradient_of_x(lora, fn, params, adapter):
  ours = jax.grad(lambda x: jnp.sin(lora.apply(params, adapter, x)).sum())
  merged = jax.grad(lambda x: jnp.sin(fn(lx.merge(params, adapter), x)).sum())
  got, want = jax.jit(lambda x: (ours(x), merged(x)))(X)
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_a_rule_ten_times_its_derivative_gives_ten_times_the_gradient():
  tenfold = matmul(back_x, lambda x, w, dy: 10.0 * back_w(x, w, dy))
  params = {"w": normal(0, 5, 7)}

  def gradient(product):
    lora = lx.adapt(lambda p, x: product(x, p["w"]), lx.LoraConfig(targets="w"))
    loss, trained = grad_of_trained(
      lora, params, perturbed(lora.init(jax.random.key(2), params, X)), X
    )
    return jax.grad(loss)(trained)["w"]

  for name in ("a", "b"):
    got, plain = (getattr(gradient(f), name) for f in (tenfold, true))
    np.testing.assert_allclose(got / plain, 10.0, rtol=1e-4)


JVPS = {
  "tangent": lambda p, x: lenient(jnp.sin(x), p["w"]),
  "turned": lambda p, x: lenient(x[:, :3], jnp.tanh(x[:3] @ p["w"])) @ p["w"].T,
  "vmapped": lambda p, x: jax.vmap(lambda x: lenient(x, p["w"]))(x[:, None]),
  "scanned": lambda p, x: lax.scan(
    lambda c, _: (lenient(jnp.sin(c), p["w"]) @ p["w"].T, None), x, None, length=2
  )[0],
}


@pytest.mark.parametrize("name", list(JVPS))
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_forward_mode_follows_a_custom_jvp(name, use_dora):
  fn, params = JVPS[name], {"w": normal(0, 5, 7) * 0.5}
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w", use_dora=use_dora))
  adapter = perturbed(lora.init(jax.random.key(2), params, X))
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  direction = jax.tree.map(jnp.cos, (trained, X))

  def ours(trained, x):
    return lora.apply(params, lx.combine(trained, rest), x)

  def dense(trained, x):
    # DoRA's norm is kept out of the gradient, which merged weights cannot say.
    delta = lx.combine(trained, rest)["w"]
    w = params["w"] + delta.delta((5, 7))
    if use_dora:
      w *= delta.magnitude[None] / jnp.sqrt(
        (lax.stop_gradient(w) ** 2).sum(0, keepdims=True)
      )
    return fn({"w": w}, x)

  got = jax.jvp(ours, (trained, X), direction)
  jax.tree.map(close, got, jax.jvp(dense, (trained, X), direction))
  out, pushed = jax.linearize(ours, trained, X)
  jax.tree.map(close, (out, pushed(*direction)), got)


masked = matmul(back_x, lambda x, w, dy: jnp.clip(x.T @ dy, -0.1, 0.1))


def test_a_gradient_that_is_no_contraction_is_an_error_unless_materialized(caplog):
  fn, params = lambda p, x: masked(x, p["w"]), {"w": normal(0, 5, 7)}
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  with pytest.raises(lx.LoraxError, match=r"'w' goes into custom_vjp .*materialize"):
    lora.init(jax.random.key(2), params, X)
  allowed = lx.LoraConfig(rank=2, targets="w", on_unsupported="materialize")
  adapter = lx.adapt(fn, allowed).init(jax.random.key(2), params, X)
  adapter = perturbed(adapter)
  with pytest.raises(lx.LoraxError, match=r"'w' goes into custom_vjp .*materialize"):
    jax.grad(lambda a: lora.apply(params, a, X).sum(), allow_int=True)(adapter)
  check_equals_merged(lx.adapt(fn, allowed), fn, params, adapter, X)
  assert "forming the dense gradient of 'w'" in caplog.text


def test_a_constant_mask_is_an_error_that_names_path_and_primitive():
  mask = np.arange(35).reshape(5, 7) % 2 == 0
  fn = lambda p, x: x @ jnp.where(mask, p["w"], 0.0)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  with pytest.raises(lx.LoraxError, match="'w' is used by 'select_n'"):
    lora.init(jax.random.key(2), {"w": normal(0, 5, 7)}, X)


def test_a_padded_weight_is_followed():
  fn = lambda p, x: jnp.pad(x, ((0, 0), (1, 2))) @ jnp.pad(p["w"], ((1, 2), (0, 3)))
  params = {"w": normal(0, 5, 7)}
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))
  adapter = perturbed(lora.init(jax.random.key(2), params, X))
  check_equals_merged(lora, fn, params, adapter, X)
  check_no_dense_gradient(lora, params, adapter, X)
