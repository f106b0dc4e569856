"""Attention as cuDNN is asked for it, against the form of other platforms.

jax.nn.dot_product_attention computes the same on any platform by its other
implementation; `python -m benchmarks.gpu` compares with cuDNN itself.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_flax.models import ops
from lorax_flax.models.ops import cudnn
from tests.models.test_splash import CASES, K, S, operands, takes, value_and_gradients

ASKED = [case for case in CASES if case not in ("soft-capped", "fewer queries")]


def asked(options, implementation="xla"):
  options = {"window": None, "scale": K**-0.5} | options
  return lambda q, k, v, mask: cudnn.attention(
    q, k, v, mask, **options, implementation=implementation
  )


@pytest.mark.parametrize("padding", ["anywhere", "behind"])
@pytest.mark.parametrize("case", ASKED)
def test_values_and_gradients_are_the_other_forms(case, padding):
  q, k, v, mask, gradient, options = operands(case)
  if padding == "behind":  # One segment a row.
    mask = jnp.ones_like(mask).at[0, 150:].set(0).at[1, 20:].set(0)
    if options["causal"]:
      gradient *= jnp.float32(mask)[:, :, None, None]
  run = lambda attend: value_and_gradients(
    lambda q, k, v: attend(q, k, v, mask), q, k, v, gradient
  )
  got = jax.jit(lambda: run(asked(options)))()
  expected = run(lambda *operands: ops.attention(*operands, **options))
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", ["causal", "padded"])
def test_rows_without_other_segments_need_no_mask(case, monkeypatch):
  """Which of the two is computed is decided by the data."""
  q, k, v, mask, _, options = operands(case)
  plain, seen = jax.nn.dot_product_attention, []

  def spy(*args, mask=None, **options):
    y = plain(*args, mask=mask, **options)
    jax.debug.callback(lambda: seen.append(mask is not None))
    return y

  monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
  run = jax.jit(asked(options))
  for changed, by_mask in (
    (jnp.ones_like(mask), False),
    (jnp.ones_like(mask).at[2, 7:].set(0), False),
    (jnp.ones_like(mask).at[2, :7].set(0), True),
    (jnp.ones_like(mask).at[2, 7:].set(2), options["causal"]),
  ):
    seen.clear()
    jax.block_until_ready(run(q, k, v, changed))
    jax.effects_barrier()
    assert seen == [by_mask]


def test_what_cudnn_does_not_compute_is_left_to_the_other_form(monkeypatch):
  of_cudnn = lambda **options: takes(cudnn, **options)
  assert not of_cudnn()  # There is no GPU.
  monkeypatch.setattr(cudnn, "_capability", lambda: 8.0)
  assert of_cudnn()
  assert of_cudnn(window=3)
  assert of_cudnn(size=128, dtype=jnp.float16)
  assert of_cudnn(causal=False, t=S - 2)
  for options in (
    {"t": S - 2},
    {"causal": False, "t": S - 1},
    {"size": 12},
    {"size": 136},
    {"dtype": jnp.float32},
    {"dropout": True},
    {"softcap": 2.0},
    {"window": jnp.int32(3)},
  ):
    assert not of_cudnn(**options)
  monkeypatch.setattr(cudnn, "_capability", lambda: 9.0)
  assert of_cudnn(size=136)


def test_gpus_get_it(monkeypatch):
  module = sys.modules["lorax_flax.models.ops.attention"]
  monkeypatch.setattr(module.devices, "platform", lambda: "gpu")
  monkeypatch.setattr(cudnn, "_capability", lambda: 9.0)
  monkeypatch.setattr(cudnn, "attention", lambda *args, **options: options)
  q = jnp.zeros((1, 8, 2, 8), jnp.bfloat16)
  mask = jnp.ones((1, 8), jnp.int32)
  form = {"causal": True, "window": 3, "softcap": None}
  assert ops.attention(q, q, q, mask, **form) == {**form, "scale": 8**-0.5}
  float32 = q.astype(jnp.float32)
  assert ops.attention(float32, float32, float32, mask, **form).shape == q.shape
