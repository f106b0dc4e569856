"""LoRA on parts of a fused kernel, against loralib's MergedLinear."""

import jax
import loralib
import numpy as np
import optax
import pytest
import torch

import lorax_flax as lx

IN, OUT, RANK, ALPHA, STEPS = 5, 12, 2, 6.0, 3
ENABLED = [(True, False, True), (False, True), (True, True, True, True)]


def _apply(params, x):
  return jax.numpy.tanh(x @ params["kernel"] + params["bias"][None])


def _lora(flags):
  config = lx.LoraConfig(
    targets="kernel",
    method="fused_lora",
    options={"enable_lora": flags},
    rank=RANK,
    alpha=ALPHA,
  )
  return lx.adapt(_apply, config)


def _start(flags):
  """loralib's layer with random factors, our base and our adapter of the same."""
  torch.manual_seed(0)
  layer = loralib.MergedLinear(
    IN, OUT, r=RANK, lora_alpha=ALPHA, enable_lora=list(flags), merge_weights=False
  )
  torch.nn.init.normal_(layer.lora_B)
  kernel = np.array(layer.weight.detach().numpy().T)
  params = {"kernel": kernel, "bias": np.array(layer.bias.detach().numpy())}
  lora = _lora(flags)
  adapter = lora.init(jax.random.key(0), params, np.zeros((1, IN), np.float32))
  n = sum(flags)
  a = layer.lora_A.detach().numpy().reshape(n, RANK, IN).transpose(2, 0, 1)
  b = layer.lora_B.detach().numpy().reshape(n, OUT // len(flags), RANK)
  delta = adapter["kernel"]
  assert (delta.a.shape, delta.b.shape) == (a.shape, b.transpose(0, 2, 1).shape)
  leaves = {"a": np.array(a), "b": np.array(b.transpose(0, 2, 1))}
  adapter["kernel"] = type(delta)(**{**vars(delta), **leaves})
  return layer, lora, params, adapter


@pytest.mark.parametrize("flags", ENABLED)
def test_it_computes_and_trains_as_loralib_does(flags):
  layer, lora, params, adapter = _start(flags)
  x = np.random.default_rng(0).normal(size=(4, IN)).astype("f4")
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  loss = lambda t: (lora.apply(params, lx.combine(t, rest), x) ** 2).mean()
  tx = optax.sgd(0.5)
  state = tx.init(trained)
  optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], 0.5)
  for _ in range(STEPS):
    value, grads = jax.jit(jax.value_and_grad(loss))(trained)
    updates, state = tx.update(grads, state, trained)
    trained = optax.apply_updates(trained, updates)
    theirs = (torch.tanh(layer(torch.tensor(x))) ** 2).mean()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    optimizer.zero_grad()
    theirs.backward()
    optimizer.step()
  with torch.no_grad():
    expected = torch.tanh(layer(torch.tensor(x))).numpy()
  got = lora.apply(params, lx.combine(trained, rest), x)
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("flags", ENABLED)
def test_only_the_columns_of_the_chosen_parts_change(flags):
  _, _, params, adapter = _start(flags)
  changed = lx.merge(params, adapter)["kernel"] != params["kernel"]
  np.testing.assert_array_equal(changed.any(0), np.repeat(flags, OUT // len(flags)))


def test_as_a_plain_lora_it_is_the_same_delta():
  _, _, params, adapter = _start(ENABLED[0])
  plain = adapter["kernel"].as_lora()
  assert plain.rank == 2 * RANK
  np.testing.assert_allclose(
    lx.merge(params, {"kernel": plain})["kernel"],
    lx.merge(params, adapter)["kernel"],
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((True,) * 5, "5 parts, which do not divide the 12 outputs"),
    ((False, False), "one at least is adapted"),
    ((1, 0, 1), "True for each part"),
  ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
  params = {"kernel": np.ones((IN, OUT), "f4"), "bias": np.ones(OUT, "f4")}
  with pytest.raises(lx.LoraxError, match=message):
    _lora(flags).plan(params, np.ones((1, IN), "f4"))


def test_an_adapter_of_a_narrower_kernel_is_refused():
  _, lora, _, adapter = _start(ENABLED[0])
  other = {"kernel": np.ones((IN, OUT + 3), "f4"), "bias": np.ones(OUT + 3, "f4")}
  with pytest.raises(lx.LoraxError, match=r"'b' of shape \(2, 2, 4\).*\(2, 2, 5\)"):
    lora.apply(other, adapter, np.ones((1, IN), "f4"))
