"""Each optimiser against its peer, on factors and on leaves trained in full."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import peft.optimizers
import pytest
import torch
import transformers

from lorax_flax.errors import LoraxError
from lorax_flax.methods import LoRA, Tuned
from lorax_flax.train import optim
from lorax_flax.train.config import TrainConfig

RATE, STEPS = 0.05, 6
PATH = "dense/kernel"


def _draw(*shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _lora(a, b):
  roles = ("stack",) * (a.ndim - 2) + ("in", "out")
  return LoRA(jnp.asarray(a), jnp.asarray(b), None, roles)


START = {
  PATH: _lora(_draw(7, 3, seed=0), _draw(3, 5, seed=1)),
  "head/kernel": Tuned(jnp.asarray(_draw(5, 4, seed=2)), None),
  "head/bias": Tuned(jnp.asarray(_draw(4, seed=3)), None),
}


def _grads(step, start=START):
  leaves, structure = jax.tree.flatten(start)
  seeds = range(100 * step, 100 * step + len(leaves))
  return structure.unflatten(
    [jnp.asarray(_draw(*x.shape, seed=s)) for s, x in zip(seeds, leaves, strict=True)]
  )


def _ours(start=START, grads=_grads, **options):
  tx = optim.optimizer(lambda step: jnp.asarray(RATE), **options)
  weights, state = start, tx.init(start)
  for step in range(1, STEPS + 1):
    with jax.numpy_dtype_promotion("standard"):  # As the step does, for optax.
      updates, state = tx.update(grads(step), state, weights)
    weights = optax.apply_updates(weights, updates)
  return weights


def _torchs(make):
  leaves, structure = jax.tree.flatten(START)
  weights = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
  optimizer = make(weights)
  for step in range(1, STEPS + 1):
    for weight, grad in zip(weights, jax.tree.leaves(_grads(step)), strict=True):
      weight.grad = torch.tensor(np.asarray(grad))
    optimizer.step()
  return structure.unflatten([w.detach().numpy() for w in weights])


def _check(got, want, rtol=1e-5):
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_is_torchs(momentum):
  got = _ours(name="sgd", momentum=momentum)
  _check(got, _torchs(lambda w: torch.optim.SGD(w, lr=RATE, momentum=momentum)))


def test_adafactor_is_transformers():
  def make(weights):
    return transformers.Adafactor(
      weights, lr=RATE, scale_parameter=False, relative_step=False, warmup_init=False
    )

  _check(_ours(name="adafactor"), _torchs(make))


def test_lion_is_optaxs():
  tx, weights = optax.lion(RATE, b1=0.9, b2=0.98, weight_decay=0.0), START
  state = tx.init(weights)
  for step in range(1, STEPS + 1):
    with jax.numpy_dtype_promotion("standard"):
      updates, state = tx.update(_grads(step), state, weights)
    weights = optax.apply_updates(weights, updates)
  _check(_ours(name="lion", b1=0.9, b2=0.98), weights)


def test_muon_is_optaxs_on_factors_and_adam_elsewhere():
  adam = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
  got = _ours(name="muon", momentum=0.9, **adam)
  others = _ours(name="adamw", **adam)
  _check(got["head/kernel"], others["head/kernel"])
  _check(got["head/bias"], others["head/bias"])
  factors = {"a": START[PATH].a, "b": START[PATH].b}
  tx = optax.contrib.muon(RATE, beta=0.9, consistent_rms=0.2)
  state = tx.init(factors)
  for step in range(1, STEPS + 1):
    grads = {"a": _grads(step)[PATH].a, "b": _grads(step)[PATH].b}
    with jax.numpy_dtype_promotion("standard"):
      updates, state = tx.update(grads, state, factors)
    factors = optax.apply_updates(factors, updates)
  _check((got[PATH].a, got[PATH].b), (factors["a"], factors["b"]), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_stacked_layers_step_as_each_by_itself(name):
  options = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "momentum": 0.9}
  a, b = _draw(2, 7, 3, seed=5), _draw(2, 3, 5, seed=6)
  stacked = {"layers": _lora(a, b)}
  got = _ours(stacked, lambda step: _grads(step, stacked), name=name, **options)
  for i in range(2):
    one = {"layers": _lora(a[i], b[i])}

    def grads(step, i=i):
      full = _grads(step, stacked)["layers"]
      return {"layers": _lora(full.a[i], full.b[i])}

    want = _ours(one, grads, name=name, **options)
    _check((got["layers"].a[i], got["layers"].b[i]), want, rtol=1e-4)


def test_lora_plus_is_pefts():
  class Net(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.dense = torch.nn.Linear(7, 5, bias=False)

  model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["dense"]))
  own = {n: p for n, p in model.named_parameters() if p.requires_grad}
  start = {PATH: START[PATH]}
  with torch.no_grad():
    for (name, p), leaf in zip(
      own.items(), (start[PATH].a, start[PATH].b), strict=True
    ):
      assert ("lora_A" in name) == (leaf is start[PATH].a)
      p.copy_(torch.tensor(np.asarray(leaf.T)))
  optimizer = peft.optimizers.create_loraplus_optimizer(
    model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0, betas=(0.9, 0.9)
  )
  grads = lambda step: {PATH: _grads(step)[PATH]}
  for step in range(1, STEPS + 1):
    grad = grads(step)[PATH]
    for p, g in zip(own.values(), (grad.a, grad.b), strict=True):
      p.grad = torch.tensor(np.asarray(g.T))
    optimizer.step()
  adam = {"b1": 0.9, "b2": 0.9, "eps": 1e-8}
  got = _ours(start, grads, lora_plus_ratio=16.0, **adam)[PATH]
  want = [p.detach().numpy().T for p in own.values()]
  _check((got.a, got.b), want)
  assert np.abs(np.asarray(got.b - START[PATH].b)).max() > 10 * RATE


def test_lora_plus_without_a_low_rank_delta_is_an_error():
  tx = optim.optimizer(lambda step: RATE, lora_plus_ratio=2.0, b1=0.9, b2=0.9, eps=1.0)
  with pytest.raises(LoraxError, match="no trained leaf is the factor b"):
    tx.init({"head/bias": START["head/bias"]})


def test_an_optimizers_settings_are_its_own():
  with pytest.raises(LoraxError, match="b2 is of no use to sgd, which reads momentum"):
    TrainConfig(steps=1, optimizer="sgd", b2=0.9)
  with pytest.raises(LoraxError, match="momentum is of no use to adamw"):
    TrainConfig(steps=1, momentum=0.5)
  with pytest.raises(LoraxError, match="did you mean 'adafactor'"):
    TrainConfig(steps=1, optimizer="adafctor")
