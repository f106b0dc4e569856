"""A quantised base in the transform: the numbers of its dense kernels, none of them
kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax import quant
from tests.adapt.checks import perturbed
from tests.methods import peft_methods as peers

pytestmark = pytest.mark.usefixtures("quick_to_compile")
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
  made = {k: jax.tree.map(lambda w: quant.quantize(w, name), params[k]) for k in LAYER}
  q = params | made
  return q, jax.tree.map(quant.dense, q, is_leaf=quant.is_quantized)


LAYER = ("up", "down")


def start(case, name, targets=("up", "down"), **config):
  fn, params = CASES[case]
  targets = [r"(up|down)(/\d+)?"] if targets == LAYER else targets
  config = {"rank": 2, "alpha": 3.0, "targets": "|".join(targets)} | config
  lora = lx.adapt(fn, lx.LoraConfig(**config))
  q, dense = quantised(params, name)
  return lora, q, dense, perturbed(lora.init(jax.random.key(2), q, X))


def loss_of(lora, params):
  return lambda adapter, x: jnp.square(lora.apply(params, adapter, x)).sum()


def check_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_logits_and_gradients_are_the_dense_kernels(case, name):
  lora, q, dense, adapter = start(case, name)
  for params in (q, dense):
    assert lora.plan(params, X).targets == lora.plan(q, X).targets
  both = [
    jax.jit(jax.value_and_grad(loss_of(lora, p), argnums=(0, 1)))(adapter, X)
    for p in (q, dense)
  ]
  check_equal(*both)
