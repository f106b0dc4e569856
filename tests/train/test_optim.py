import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from lorax_flax.methods import LoRA, Tuned
from lorax_flax.train import optim

_PEERS = {
  "constant": lambda o, total, warmup: transformers.get_constant_schedule_with_warmup(
    o, warmup
  ),
  "cosine": lambda o, total, warmup: transformers.get_cosine_schedule_with_warmup(
    o, warmup, total
  ),
  "linear": lambda o, total, warmup: transformers.get_linear_schedule_with_warmup(
    o, warmup, total
  ),
}


def _torch_optimizer(weights, lr, **kwargs):
  return torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), eps=1e-6, **kwargs)


@pytest.mark.parametrize("name", sorted(optim.SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
def test_schedules_equal_those_of_transformers(name, warmup):
  optimizer = _torch_optimizer([torch.zeros(1, requires_grad=True)], 3e-4)
  peer = _PEERS[name](optimizer, 30, warmup)
  wanted = []
  for _ in range(30):
    wanted.append(peer.get_last_lr()[0])
    optimizer.step()
    peer.step()
  rate = optim.schedule(name, 3e-4, 30, warmup)
  ours = [float(rate(step)) for step in range(30)]
  np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-10)


def test_ten_steps_equal_torch_adamw_with_clipping_decay_and_warmup():
  rng = np.random.default_rng(0)
  start = {
    "dense/kernel": rng.normal(size=(5, 4)).astype(np.float32),
    "dense/bias": rng.normal(size=4).astype(np.float32),
  }
  x = rng.normal(size=(10, 8, 5)).astype(np.float32)
  y = rng.normal(size=(10, 8, 4)).astype(np.float32)

  theirs = {k: torch.tensor(v, requires_grad=True) for k, v in start.items()}
  optimizer = _torch_optimizer(
    [
      {"params": [theirs["dense/kernel"]], "weight_decay": 0.1},
      {"params": [theirs["dense/bias"]], "weight_decay": 0.0},
    ],
    0.05,
  )
  schedule = transformers.get_linear_schedule_with_warmup(optimizer, 3, 10)
  for x_i, y_i in zip(torch.tensor(x), torch.tensor(y), strict=True):
    loss = ((x_i @ theirs["dense/kernel"] + theirs["dense/bias"] - y_i) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
    optimizer.step()
    schedule.step()

  tx = optim.optimizer(
    optim.schedule("linear", 0.05, 10, 3),
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    weight_decay=0.1,
    grad_clip=1.0,
  )
  ours = {k: Tuned(jnp.asarray(v), None) for k, v in start.items()}
  state = tx.init(ours)

  def loss_of(weights, x_i, y_i):
    y = x_i @ weights["dense/kernel"].value + weights["dense/bias"].value[None]
    return jnp.mean(jnp.square(y - y_i))

  for x_i, y_i in zip(x, y, strict=True):
    grads = jax.grad(loss_of)(ours, x_i, y_i)
    with jax.numpy_dtype_promotion("standard"):  # As the step does, for optax.
      updates, state = tx.update(grads, state, ours)
    ours = optax.apply_updates(ours, updates)
  for name, weight in theirs.items():
    np.testing.assert_allclose(ours[name].value, weight.detach(), rtol=1e-5, atol=1e-6)


def test_biases_and_norms_do_not_decay_and_factors_do():
  one = jnp.ones(())
  leaves = {
    "encoder/layer_0/attention/query/kernel": True,
    "encoder/layer_0/attention/query/bias": False,
    "encoder/layer_0/layer_norm/scale": False,
    "LayerNorm_0/scale": False,
    "norm/weight": False,
    "classifier/kernel": True,
    "normal_dense/kernel": True,
  }
  trained = {path: Tuned(one, None) for path in leaves}
  trained["encoder/layer_1/query/kernel"] = LoRA(one, one, None, ("in", "out"))
  mask = optim.decay_mask(trained)
  found = {path: mask[path].value for path in leaves}
  assert found == leaves
  factors = mask["encoder/layer_1/query/kernel"]
  assert (factors.a, factors.b) == (True, True)
