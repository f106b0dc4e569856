"""AdaLoRA beside PEFT's: penalty, schedule, folders; and what it needs to be told."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

import lorax_flax as lx
from tests.adapt.checks import perturbed

RANK, ALPHA, LEARNING_RATE, STEPS = 4, 6, 5e-2, 9
# Choices at 4, 6, and, the last one, 7; two more steps stay with it.
OPTIONS = {"target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2, "total_step": STEPS}
X = np.random.default_rng(0).normal(size=(5, 12)).astype("f4")


class Model(torch.nn.Module):
  def __init__(self):
    super().__init__()
    torch.manual_seed(0)
    self.up, self.down = torch.nn.Linear(12, 8), torch.nn.Linear(8, 6)

  def forward(self, x):
    return SimpleNamespace(loss=torch.square(self.down(torch.tanh(self.up(x)))).sum())


def apply(p, x):
  up, down = p["up"], p["down"]
  hidden = jnp.tanh(x @ up["kernel"] + up["bias"][None])
  return hidden @ down["kernel"] + down["bias"][None]


def params_of(model):
  array = lambda x: jnp.asarray(x.detach().numpy().T)
  return {
    name: {"kernel": array(m.weight), "bias": array(m.bias)}
    for name, m in (("up", model.up), ("down", model.down))
  }


def leaves_of(module):
  """PEFT's tensors of one module, as ours."""
  get = lambda name: np.array(getattr(module, name).default.detach().numpy().T)
  return {"a": get("lora_A"), "b": get("lora_B"), "e": get("lora_E")[0]}


@pytest.fixture(scope="module")
def trained():
  """The adapter after each step, and the same of PEFT."""
  base = Model()
  params = params_of(base)
  config = peft.AdaLoraConfig(
    init_r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], **OPTIONS
  )
  model = peft.get_peft_model(base, config).base_model
  modules = {name: getattr(model.model, name) for name in ("up", "down")}
  lora = lx.adapt(
    apply,
    lx.LoraConfig(
      targets=".*kernel", method="adalora", rank=RANK, alpha=ALPHA, options=OPTIONS
    ),
  )
  adapter = lora.init(jax.random.key(0), params, X)
  for delta in adapter.values():
    assert not np.any(delta.e)
    np.testing.assert_allclose(np.std(delta.a), 0.02, rtol=0.5)
  adapter = {
    path: dataclasses.replace(
      delta, **jax.tree.map(jnp.asarray, leaves_of(modules[path.split("/")[0]]))
    )
    for path, delta in adapter.items()
  }
  ours, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  optimizer = lx.scheduled(optax.adamw(LEARNING_RATE, weight_decay=0.1), adapter)
  state = optimizer.init(ours)
  theirs = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.1
  )

  @jax.jit
  def step(ours, state):
    def loss(ours):
      whole = lx.combine(ours, rest)
      return jnp.square(lora.apply(params, whole, X)).sum() + lx.penalty(whole)

    value, grads = jax.value_and_grad(loss)(ours)
    with jax.numpy_dtype_promotion("standard"):  # of optax's counts
      updates, state = optimizer.update(grads, state, ours)
    return optax.apply_updates(ours, updates), state, value

  found = []
  for number in range(1, STEPS + 1):
    ours, state, value = step(ours, state)
    want = model(torch.tensor(X)).loss
    want.backward()
    theirs.step()
    model.update_and_allocate(number)
    theirs.zero_grad()
    each = {name: leaves_of(module) for name, module in modules.items()}
    found.append((value, want.item(), ours, each))
  return lora, params, lx.combine(ours, rest), model, found


def test_loss_and_factors_are_pefts_after_every_step(trained):
  *_, found = trained
  pruned = []
  for value, want, ours, theirs in found:
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for name, leaves in theirs.items():
      delta = ours[f"{name}/kernel"]
      for leaf, x in leaves.items():
        np.testing.assert_allclose(
          getattr(delta, leaf), x, rtol=1e-4, atol=2e-5, err_msg=f"{name} {leaf}"
        )
      np.testing.assert_array_equal(delta.e == 0, leaves["e"] == 0)
    pruned.append(sum(int((d.e == 0).sum()) for d in ours.values()))
  # int((8 - 4) (3/5)³ + 4) = 4 of 8 are left at step 4; in between all train again.
  assert pruned == [0, 0, 0, 4, 0, 4, 4, 4, 4]


def test_the_end_is_pefts_in_value_and_merged(trained):
  lora, params, adapter, model, _ = trained
  got = np.square(lora.apply(params, adapter, X)).sum()
  with torch.no_grad():
    penalty = float(lx.penalty(adapter))
    np.testing.assert_allclose(
      got + penalty, model(torch.tensor(X)).loss.item(), rtol=1e-5
    )
  want = params_of(model.merge_and_unload())
  merged = lx.merge(params, adapter)
  for name, module in want.items():
    np.testing.assert_allclose(merged[name]["kernel"], module["kernel"], atol=2e-5)


def test_most_methods_add_no_penalty_and_leave_the_optimiser():
  lora = lx.adapt(apply, lx.LoraConfig(targets=".*kernel"))
  adapter = lora.init(jax.random.key(0), params_of(Model()), X)
  optimizer = optax.sgd(0.1)
  assert lx.penalty(adapter) == 0
  assert lx.scheduled(optimizer, adapter) is optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loop_adds_the_penalty_and_follows_the_schedule(accumulation, trained):
  lora, params, *_ = trained
  loss = lambda outputs, batch: jnp.square(outputs).sum(-1)
  batches = [(X[:4], np.zeros(4, "f4"))]
  options = {"learning_rate": 1e-2, "log_steps": 1, "accumulation": accumulation}
  fitted = lx.fit(lora, params, batches, loss, steps=STEPS, **options)
  kept = [int((delta.e != 0).sum()) for delta in fitted.adapter.values()]
  assert sum(kept) == 4
  start = lora.init(jax.random.key(0), params, X)
  first = fitted.history[0]["train/loss"]
  # Normal factors of std 0.02 are far from orthonormal: 0.5 √4, each.
  assert 0.8 < float(lx.penalty(start)) < 1.1
  without = np.square(apply(params, X[:4])).sum(-1).mean()
  np.testing.assert_allclose(first - without, lx.penalty(start), rtol=1e-4)


def test_trials_side_by_side_choose_each_for_itself(trained):
  lora, params, _, _, _ = trained
  adapter = lora.init(jax.random.key(0), params, X)
  each = [perturbed(adapter, seed) for seed in range(2)]
  optimizer = lx.scheduled(optax.sgd(1e-2), adapter)

  def run(adapter):
    ours, rest = lx.partition(adapter, lx.trainable_mask(adapter))
    loss = lambda x: jnp.square(lora.apply(params, lx.combine(x, rest), X)).sum()

    def step(carry, _):
      updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    end, _ = jax.lax.scan(step, (ours, optimizer.init(ours)), length=STEPS)
    return {path: delta.e for path, delta in end[0].items()}

  together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *xs: jnp.stack(xs), *each))
  for i, one in enumerate(each):
    alone = jax.jit(run)(one)
    assert sum(int((e != 0).sum()) for e in alone.values()) == 4
    for path, e in alone.items():
      np.testing.assert_allclose(together[path][i], e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"target_r": 2}, "needs the number of steps .*total_step"),
    ({"target_r": 4, "total_step": 9}, "target_r=4 must be from 1 to 3"),
    ({"target_r": 2, "total_step": 9, "tinit": 9}, "no steps in which .* lower tinit"),
    ({"target_r": 2, "total_step": 9, "deltaT": 0}, "deltaT=0 must be 1 or more"),
    ({"target_r": 2, "total_steps": 9}, "did you mean 'total_step'"),
  ],
)
def test_options_that_leave_nothing_to_allocate_are_refused(options, message):
  def make():
    config = lx.LoraConfig(
      targets=".*kernel", method="adalora", rank=RANK, options=options
    )
    lx.adapt(apply, config).init(jax.random.key(0), params_of(Model()), X)

  with pytest.raises(lx.LoraxError, match=message):
    make()
