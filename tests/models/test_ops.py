"""The encoder's maths against float64, and what it keeps for the gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lorax_flax as lx
from lorax_flax.models import ops


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape) * 2.0


def leaves_kept(fn, *args):
  """Shapes of what a function keeps for its gradient."""
  _, vjp = jax.vjp(fn, *args)
  return sorted(x.shape for x in jax.tree.leaves(vjp) if x.size)


def torch_grads(fn, *arrays):
  tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
  out = fn(*tensors)
  torch.sin(out).sum().backward()
  return out.detach().numpy(), [t.grad.numpy() for t in tensors]


def our_grads(fn, *arrays):
  args = [jnp.asarray(a, jnp.float32) for a in arrays]
  numbers = tuple(range(len(args)))
  grads = jax.grad(lambda *xs: jnp.sin(fn(*xs)).sum(), numbers)(*args)
  return fn(*args), grads


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 33)])
def test_gelu_is_exact_in_value_and_gradient(shape):
  x = draw(0, *shape) * 3.0
  want, want_grads = torch_grads(torch.nn.functional.gelu, x)
  got, grads = our_grads(ops.gelu, x)
  np.testing.assert_allclose(got, want, atol=2e-6)
  np.testing.assert_allclose(grads[0], want_grads[0], atol=5e-6)


def test_gelu_keeps_its_input_alone():
  x = jnp.asarray(draw(0, 3, 7), jnp.float32)
  assert leaves_kept(ops.gelu, x) == [(3, 7)]


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 33), (1, 1, 2)])
def test_layer_norm_equals_torch_in_value_and_gradient(shape):
  d = shape[-1]
  arrays = draw(0, *shape), draw(1, d), draw(2, d)
  norm = lambda x, s, b: torch.nn.functional.layer_norm(x, (d,), s, b, 1e-5)
  want, want_grads = torch_grads(norm, *arrays)
  got, grads = our_grads(lambda x, s, b: ops.layer_norm(x, s, b, 1e-5), *arrays)
  np.testing.assert_allclose(got, want, atol=2e-5)
  for g, w in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(g, w, atol=2e-4 if d == 2 else 3e-5)


def test_layer_norm_keeps_one_array_of_its_inputs_size():
  x, s = jnp.asarray(draw(0, 4, 6), jnp.float32), jnp.ones(6)
  kept = leaves_kept(lambda x: ops.layer_norm(x, s, s, 1e-5), x)
  assert kept.count((4, 6)) == 1


def test_bfloat16_stays_bfloat16_with_float32_statistics():
  x = jnp.asarray(draw(0, 3, 64), jnp.bfloat16)
  s = jnp.ones(64, jnp.float32)
  y = ops.layer_norm(x, s, s, 1e-5)
  assert y.dtype == jnp.bfloat16
  assert jax.grad(lambda x: ops.gelu(x).astype(jnp.float32).sum())(x).dtype == x.dtype


def test_attention_equals_torch_with_masked_keys():
  q, k, v = draw(0, 2, 5, 3, 4), draw(1, 2, 7, 3, 4), draw(2, 2, 7, 3, 4)
  mask = np.ones((2, 7), np.int32)
  mask[1, 4:] = 0

  def theirs(q, k, v):
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    keep = torch.tensor(mask).bool()[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=keep)
    return out.transpose(1, 2)

  want, want_grads = torch_grads(theirs, q, k, v)
  got, grads = our_grads(lambda *a: ops.attention(*a, jnp.asarray(mask)), q, k, v)
  np.testing.assert_allclose(got, want, atol=2e-5)
  for g, w in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(g, w, atol=5e-5)


def test_a_row_with_every_key_masked_is_finite():
  q = jnp.asarray(draw(0, 1, 2, 1, 4), jnp.float32)
  out, grads = jax.value_and_grad(
    lambda q: ops.attention(q, q, q, jnp.zeros((1, 2), jnp.int32)).sum()
  )(q)
  assert np.isfinite(out)
  assert np.isfinite(grads).all()


def torch_causal(q, k, v, mask, window=None, scale=None, softcap=None):
  """Causal attention as transformers writes it out."""
  heads = [t.transpose(1, 2) for t in (q, k, v)]
  q, k, v = heads[0], *(t.repeat_interleave(q.shape[2] // 2, 1) for t in heads[1:])
  (t, size), s = q.shape[2:], k.shape[2]
  logits = q @ k.transpose(2, 3) * (scale or size**-0.5)
  if softcap:
    logits = softcap * torch.tanh(logits / softcap)
  back = torch.arange(s - t, s)[:, None] - torch.arange(s)
  near = (back >= 0) & (back < (window or s))
  near = near & torch.tensor(mask).bool()[:, None, None, :]
  logits = logits.masked_fill(~near, torch.finfo(logits.dtype).min)
  return (torch.softmax(logits, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
  ("queries", "options"),
  [
    (7, {}),
    (3, {"window": 2}),
    (7, {"window": 3, "scale": 0.7, "softcap": 1.5}),
  ],
)
def test_causal_attention_over_shared_keys_equals_torch(queries, options):
  q, k, v = draw(0, 2, queries, 6, 4), draw(1, 2, 7, 2, 4), draw(2, 2, 7, 2, 4)
  mask = np.ones((2, 7), np.int32)
  mask[1, 3] = 0

  want, want_grads = torch_grads(lambda *a: torch_causal(*a, mask, **options), q, k, v)
  attend = partial(ops.attention, mask_BxS=jnp.asarray(mask), causal=True, **options)
  got, grads = our_grads(attend, q, k, v)
  np.testing.assert_allclose(got, want, atol=2e-5)
  for g, w in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(g, w, atol=5e-5)


def test_a_window_may_be_traced():
  q, mask = jnp.asarray(draw(0, 1, 5, 2, 4), jnp.float32), jnp.ones((1, 5))

  def attend(window):
    return ops.attention(q, q, q, mask, causal=True, window=window)

  np.testing.assert_allclose(jax.jit(attend)(2), attend(2), atol=1e-6)
  np.testing.assert_allclose(jax.jit(attend)(9), attend(None), atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_keeps_one_array_of_the_weights_size_and_no_repeated_keys(softcap):
  q, k = (jnp.asarray(draw(i, 1, 5, n, 4), jnp.float32) for i, n in ((0, 6), (1, 2)))
  attend = partial(
    ops.attention, mask_BxS=jnp.ones((1, 5)), causal=True, softcap=softcap
  )
  kept = leaves_kept(attend, q, k, k)
  rows = (1, 2, 15)
  assert kept == sorted(
    [(*rows, 1), (*rows, 4), (*rows, 5), (1, 5, 6, 4), (1, 2, 5, 4), (1, 2, 5, 4)]
  )


@pytest.mark.parametrize(
  ("heads", "options", "message"),
  [
    (3, {"causal": True}, "3 heads of queries over 2 heads of keys"),
    (2, {"window": 2}, "a window needs causal attention"),
  ],
)
def test_an_attention_that_there_is_not_is_an_error(heads, options, message):
  q, k = jnp.zeros((1, 2, heads, 4)), jnp.zeros((1, 2, 2, 4))
  with pytest.raises(lx.LoraxError, match=message):
    ops.attention(q, k, k, jnp.ones((1, 2)), **options)


@pytest.mark.parametrize(("offset", "late"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 3, 8)])
def test_rms_norm_equals_torch_in_value_and_gradient(shape, offset, late):
  arrays = draw(0, *shape), draw(1, shape[-1])
  norm = lambda x, s: (
    (s + offset) * torch.nn.functional.rms_norm(x, shape[-1:], eps=1e-5)
  )
  want, want_grads = torch_grads(norm, *arrays)
  got, grads = our_grads(lambda x, s: ops.rms_norm(x, s, 1e-5, offset, late), *arrays)
  np.testing.assert_allclose(got, want, atol=2e-5)
  for g, w in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(g, w, atol=5e-5)


@pytest.mark.parametrize("late", [False, True])
def test_rms_norm_rounds_where_the_family_does(late):
  x, scale = (draw(i, *s).astype(np.float32) for i, s in ((0, (9, 64)), (1, (64,))))
  x, scale = jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16)
  wide = torch.tensor(np.asarray(x, np.float32))
  normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
  theirs = torch.tensor(np.asarray(scale, np.float32))
  if late:
    want = (normed * theirs).to(torch.bfloat16)
  else:
    want = normed.to(torch.bfloat16) * theirs.to(torch.bfloat16)
  got = np.asarray(ops.rms_norm(x, scale, 1e-5, 0.0, late), np.float32)
  assert (got != want.float().numpy()).mean() < 0.01


def test_rms_norm_keeps_one_array_of_its_inputs_size():
  x, s = jnp.asarray(draw(0, 4, 6), jnp.float32), jnp.ones(6)
  kept = leaves_kept(lambda x: ops.rms_norm(x, s, 1e-5), x)
  assert kept.count((4, 6)) == 1


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_gated_activation_equals_torch_and_keeps_its_inputs_alone(name):
  theirs = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
  }[name]
  arrays = draw(0, 3, 7), draw(1, 3, 7)
  want, want_grads = torch_grads(lambda g, u: theirs(g) * u, *arrays)
  got, grads = our_grads(partial(ops.gated, name), *arrays)
  np.testing.assert_allclose(got, want, atol=2e-5)
  for g, w in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(g, w, atol=5e-5)
  assert (
    leaves_kept(partial(ops.gated, name), *map(jnp.asarray, got[None].repeat(2, 0)))
    == [(3, 7)] * 2
  )
