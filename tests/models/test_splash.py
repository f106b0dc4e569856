"""Attention by the TPU's kernel, interpreted, against the form of other platforms."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lorax_flax.models import ops
from lorax_flax.models.ops import cudnn, splash
from lorax_flax.sharding.mesh import AXES
from tests.adapt.checks import all_equations

CASES = {
  "causal": {"causal": True},
  "windows": {"causal": True, "window": 50},
  "soft-capped": {"causal": True, "softcap": 2.0},
  "padded": {"causal": False},
  "scaled": {"causal": False, "scale": 0.3},
  "fewer queries": {"causal": True, "queries": 130},
  "across": {"causal": False, "queries": 140},
}
B, S, H, G, K = 4, 200, 4, 2, 16


def operands(case, batch=B):
  """q, k, v, mask, and a gradient that is zero for queries without a use."""
  options = dict(CASES[case])
  t, rng = options.pop("queries", S), np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v = draw(batch, t, H, K), draw(batch, S, G, K), draw(batch, S, G, K)
  mask = np.ones((batch, S), np.int32)
  mask[0, 150:], mask[1, :20] = 0, 0
  if options["causal"]:  # Segments, as packed rows have.
    mask[2, 60:] += 1
    mask[2, 131:] += 1
  used = mask[:, S - t :] if options["causal"] else np.ones((batch, t), np.int32)
  is_used = np.float32(used != 0)[:, :, None, None]
  gradient = draw(*q.shape) * jnp.broadcast_to(is_used, q.shape)
  return q, k, v, jnp.asarray(mask), gradient, options


def value_and_gradients(attend, q, k, v, gradient):
  y, pull = jax.vjp(attend, q, k, v)
  return [jnp.where(gradient != 0, y, 0.0), *pull(gradient)]


def interpreted(options):
  options = {"window": None, "softcap": None, "scale": K**-0.5} | options
  return lambda q, k, v, mask: splash.attention(
    q, k, v, mask, **options, interpret=True
  )


def takes(kernel=splash, batch=B, t=S, size=K, dtype=jnp.bfloat16, **options):
  options = {"causal": True, "window": None, "softcap": None} | options
  q = jax.ShapeDtypeStruct((batch, t, H, size), dtype)
  k = jax.ShapeDtypeStruct((batch, S, G, size), dtype)
  return kernel.takes(q, k, **{"dropout": False, **options})


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_other_forms(case):
  q, k, v, mask, gradient, options = operands(case)
  kernel = interpreted(options)
  got = value_and_gradients(
    jax.jit(lambda q, k, v: kernel(q, k, v, mask)), q, k, v, gradient
  )
  want = value_and_gradients(
    lambda q, k, v: ops.attention(q, k, v, mask, **options), q, k, v, gradient
  )
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_one_of_128_lanes_is_kept_for_the_gradient():
  q, k, v, mask, _, options = operands("causal")
  attend = interpreted(options)
  made = jax.make_jaxpr(lambda q: jax.vjp(lambda q: attend(q, k, v, mask), q))(q)
  kept = [
    [tuple(x.aval.shape) for x in e.outvars]
    for e in all_equations(made.jaxpr)
    if e.primitive.name == "optimization_barrier"
  ]
  (kept,) = kept  # Together with the result, which waits for them.
  length = S + -S % 128
  assert {(B, H, length), (B, H, length, K)} <= {*kept}
  assert (B, H, length, 128) not in kept


def test_what_the_kernel_does_not_compute_is_left_to_the_other_form():
  assert takes(window=3)
  assert takes(t=128)
  assert takes(causal=False, softcap=2.0)
  assert not takes(dropout=True)
  assert not takes(t=127)
  assert not takes(window=jnp.int32(3))


def on_meshes():
  """Rows and heads on eight devices; run in a process that has them."""
  q, k, v, mask, gradient, options = operands("causal")
  kernel = interpreted(options)
  run = lambda q, k, v, mask: value_and_gradients(
    lambda q, k, v: kernel(q, k, v, mask), q, k, v, gradient
  )
  want = run(q, k, v, mask)
  for sizes in ((4, 1, 2, 1, 1), (2, 2, 1, 1, 1), (1, 2, 2, 2, 1)):
    with jax.set_mesh(_mesh(sizes)):
      assert takes()
      assert not takes(batch=3)
      found = jax.jit(run)(q, k, v, mask)
    for x, y in zip(found, want, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def _mesh(sizes):
  count = int(np.prod(sizes))
  axes = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(sizes, AXES, axes, devices=jax.devices()[:count])


def on_meshes_of_tokens():
  """Each form's own queries on four and eight devices; as `on_meshes`."""
  for case in ("causal", "windows", "padded"):
    q, k, v, mask, gradient, options = operands(case)
    fixed = {"window": None, "scale": K**-0.5} | options
    forms = {
      "plain": partial(ops.attention, **options),
      "cudnn": partial(cudnn.attention, **fixed, implementation="xla"),
      "splash": interpreted(options),
    }
    want = _of_form(forms["plain"], q, k, v, mask, gradient)
    for sizes in ((1, 1, 1, 1, 4), (1, 2, 2, 1, 2)):
      with jax.set_mesh(_mesh(sizes)):
        assert not takes(t=128)  # Each device has too few.
        for name, form in forms.items():
          found = jax.jit(partial(_of_form, form))(q, k, v, mask, gradient)
          for x, y in zip(found, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5, err_msg=name)


def _of_form(attend, q, k, v, mask, gradient):
  return value_and_gradients(lambda *qkv: attend(*qkv, mask), q, k, v, gradient)


def test_queries_are_sharded_over_the_mesh():
  _in_a_process("on_meshes_of_tokens")


def test_rows_and_heads_are_sharded_over_the_mesh():
  _in_a_process("on_meshes")


def _in_a_process(name):
  """Calls a function of this module where there are eight devices."""
  code = f"from tests.models import test_splash as t; t.{name}()"
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
  subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
