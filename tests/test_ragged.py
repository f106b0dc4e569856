"""Ragged products against products of every row with every matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_flax import ragged
from lorax_flax.ragged import blocks, masked, megablox

N, E, I, O = 37, 5, 6, 9
SIZES = ([3, 0, 20, 6, 8], [0, 0, N, 0, 0], [1, 2, 3, 0, 4], [0] * E)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


X, W, CT = normal(0, N, I), normal(1, E, I, O), normal(2, N, O)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
  """Blocks of which groups fill several."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blocks, "_ROWS", 8)
    yield


def dense(x, w, sizes):
  own = jax.nn.one_hot(ragged.groups(sizes, x.shape[0]), w.shape[0])
  return jnp.einsum("ni,eio,ne->no", x, w, own)


def back(fn, x, w, sizes, ct):
  """Value and gradients."""
  y, pull = jax.vjp(lambda x, w: fn(x, w, sizes), x, w)
  return y, *pull(ct)


def check_close(got, want):
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got, want)


def turned(x, w, sizes):
  return ragged.product(x, w.swapaxes(1, 2), sizes, turned=True)


@pytest.mark.parametrize("fn", [ragged.product, turned])
def test_values_and_gradients_equal_the_dense_form(fn):
  both = [jax.jit(lambda s, f=f: back(f, X, W, s, CT)) for f in (fn, dense)]
  for sizes in SIZES:
    check_close(*(f(jnp.array(sizes, jnp.int32)) for f in both))


@pytest.mark.parametrize(
  ("form", "options"), [(megablox, {"interpret": True}), (masked, {})]
)
def test_the_other_forms_equal_the_dense_one(form, options):
  for sizes in map(jnp.array, SIZES):
    y, dx, dw = back(dense, X, W, sizes, CT)
    check_close(form.product(X, W, sizes, turned=False, **options), y)
    check_close(form.product(CT, W, sizes, turned=True, **options), dx)
    check_close(form.outer(X, CT, sizes, **options), dw)


@pytest.mark.parametrize(
  "axes", [(0, None, 0), (0, 0, 0), (None, 0, None), (0, None, None), (1, 2, 0)]
)
def test_a_batch_is_one_product(axes):
  operands = [
    jnp.stack([t, 2 * t, t], axis) if axis is not None else t
    for t, axis in zip((X, W, jnp.array(SIZES[2])), axes, strict=True)
  ]
  run = lambda fn: jax.vmap(lambda *args: back(fn, *args, CT), axes)(*operands)
  check_close(run(ragged.product), run(dense))


def test_second_derivatives_equal_the_dense_form():
  sizes = jnp.array(SIZES[2])

  def twice(fn):
    inner = lambda x: jax.grad(lambda w: jnp.sin(fn(x, w, sizes)).sum())(W)
    return jax.grad(lambda x: (inner(x) ** 2).sum())(X)

  np.testing.assert_allclose(twice(ragged.product), twice(dense), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
  x, w = (t.astype(jnp.bfloat16) for t in (X, W))
  y = ragged.product(x, w, jnp.array(SIZES[0]))
  assert y.dtype == jnp.bfloat16
  want = dense(x.astype(jnp.float32), w.astype(jnp.float32), jnp.array(SIZES[0]))
  np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)
