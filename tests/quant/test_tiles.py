"""Products by tiles of a 4-bit kernel, interpreted, against its dense kernel."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import lorax_flax as lx
from lorax_flax import quant
from lorax_flax.quant import tiles
from lorax_flax.sharding.mesh import AXES
from tests.adapt.checks import all_equations

IN, OUT = 768, 384  # No multiples of the largest tiles.


def kernel(fan_in=IN, fan_out=OUT, name="nf4", dtype=jnp.bfloat16):
  w = jax.random.normal(jax.random.key(0), (fan_in, fan_out)) / 16
  return quant.quantize(w.astype(dtype), name)


def rows(*shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(1), shape).astype(dtype)


@pytest.fixture
def interpreted(monkeypatch):
  """The kernel as this platform's."""

  def product(leaf, x, transposed):
    return tiles.product(leaf, x, transposed=transposed, interpret=True)

  table = {"cpu": SimpleNamespace(takes=tiles.takes, product=product)}
  monkeypatch.setattr(quant, "KERNELS", table)


@pytest.mark.parametrize("name", ["nf4", "nf4_single", "int4"])
def test_products_are_those_of_the_dense_kernel(name):
  leaf = kernel(name=name)
  w = leaf.dense().astype(jnp.float32)
  # One row is a weight: the numbers of a tile are the dense kernel's to the last bit.
  for x, transposed, want in (
    (jnp.eye(IN)[None], False, w[None]),
    (jnp.eye(OUT)[None], True, w.T[None]),
    (rows(3, 7, IN), False, rows(3, 7, IN).astype(jnp.float32) @ w),
    (rows(1100, OUT), True, rows(1100, OUT).astype(jnp.float32) @ w.T),
  ):
    y = tiles.product(
      leaf, x.astype(jnp.bfloat16), transposed=transposed, interpret=True
    )
    assert y.dtype == jnp.bfloat16
    exact = x.shape[-2] == x.shape[-1]
    np.testing.assert_allclose(
      y.astype(jnp.float32), want, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-3
    )


def test_what_the_kernel_does_not_compute_is_left_to_dense_kernels():
  x = rows(4, IN)
  assert tiles.takes(kernel(), x)
  assert tiles.takes(kernel(name="int4"), x)
  assert not tiles.takes(kernel(name="int8"), x)
  assert not tiles.takes(kernel(name="q4_0"), x)
  assert not tiles.takes(kernel(fan_in=384), rows(4, 384))
  assert not tiles.takes(kernel(fan_out=320), x)
  assert not tiles.takes(kernel(dtype=jnp.float32), x)
  assert not tiles.takes(kernel(), rows(4, IN, dtype=jnp.float32))
  assert not tiles.takes(kernel(), rows(IN))
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), kernel())
  assert not tiles.takes(stacked, x)


def test_on_a_mesh_it_is_taken_where_only_rows_are_sharded():
  def taken(rows_of_x=8, **sizes):
    shape = tuple(sizes.get(name, 1) for name in AXES)
    mesh = jax.sharding.AbstractMesh(shape, AXES, (AxisType.Auto,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh):
      return tiles.takes(kernel(), jax.ShapeDtypeStruct((rows_of_x, IN), jnp.bfloat16))

  assert taken()
  assert taken(fsdp=4, data=2)
  assert not taken(rows_of_x=6, fsdp=4)
  assert not taken(fsdp=4, tensor=2)


def model(params, x):
  def layer(x, w):
    up, down = w
    return x + jnp.tanh(x @ up) @ down, None

  return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


def test_an_adapted_model_multiplies_by_tiles(interpreted):
  name, dtype = "nf4", jnp.bfloat16
  up, down = (
    (jax.random.normal(jax.random.key(i), (2, *s)) / 32).astype(dtype)
    for i, s in enumerate([(IN, 512), (512, IN)])
  )
  base = {k: quant.quantize(w, name) for k, w in (("up", up), ("down", down))}
  dense = jax.tree.map(quant.dense, base, is_leaf=quant.is_quantized)
  fn = lambda params, x: model((params["up"], params["down"]), x)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=".*"))
  x = rows(2, 5, IN)
  adapter = lora.init(jax.random.key(2), dense, x)
  adapter = jax.tree.map(
    lambda a: a + 0.01 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), adapter
  )

  def step(base):
    def loss(adapter, x):
      return (lora.apply(base, adapter, x).astype(jnp.float32) ** 2).mean()

    return jax.value_and_grad(loss, (0, 1))

  made = jax.make_jaxpr(step(base))(adapter, x)
  equations = list(all_equations(made.jaxpr))
  # Two products in the forward pass, the first again, and their two gradients.
  assert sum(e.primitive.name == "pallas_call" for e in equations) == 5
  shapes = {tuple(v.aval.shape) for e in equations for v in e.outvars}
  assert not shapes & {(IN, 512), (512, IN)}
  got = jax.jit(step(base))(adapter, x)
  want = jax.jit(step(dense))(adapter, x)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= 0.02 * np.abs(b).max() + 1e-6
