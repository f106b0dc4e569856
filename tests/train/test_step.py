import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_flax.methods import Tuned
from lorax_flax.train import optim, step
from lorax_flax.train import state as states
from tests.train import toy


def _start(accumulation=1, dropout=False, rate=0.01):
  job = toy.job()
  forward = job.model.forward
  if not dropout:
    forward = lambda params, adapter, batch, key: job.model.forward(
      params, adapter, batch, None
    )
  schedule = lambda step: jnp.float32(rate)
  optimizer = optim.optimizer(
    schedule, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, grad_clip=1e9
  )
  state, base = states.create(
    job.model.params, job.runs[0].adapter, optimizer, jax.random.key(0)
  )
  train = step.jitted(
    step.train_step(forward, job.objective.loss, optimizer, schedule, accumulation)
  )
  return train, state, base


def _batch(rows=8, length=24):
  index = np.arange(rows)
  return toy.tokens(60, 1).batch(index, length)


def _trained(state):
  return jax.tree.map(np.asarray, state.trained)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_gives_the_large_batch_even_with_uneven_weights(parts):
  batch = _batch()
  # A part whose rows weigh nothing at all, and parts that weigh differently.
  batch["weights"] = np.array([1, 0, 1, 1, 1, 0, 1, 0], np.float32)
  results = []
  for accumulation in (1, parts):
    train, state, base = _start(accumulation)
    for _ in range(3):
      state, metrics = train(state, base, batch)
    results.append((_trained(state), jax.device_get(metrics)))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6),
    *results,
  )


def test_rows_of_weight_zero_change_nothing():
  batch = _batch()
  full, state, base = _start()
  padded = {k: np.concatenate([v, v[:2]]) for k, v in batch.items()}
  padded["weights"][8:] = 0
  state, metrics = full(state, base, batch)
  again, other, base = _start()
  other, same = again(other, base, padded)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    (_trained(state), jax.device_get(metrics)),
    (_trained(other), jax.device_get(same)),
  )


def test_only_trained_leaves_have_optimiser_state():
  _, state, base = _start()
  trained = jax.tree.leaves(state.trained)
  shapes = {x.shape for x in trained}
  assert shapes == {(8, 2), (2, 8)}
  moments = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sorted(moments) == sorted(2 * [x.shape for x in trained])
  assert sum(x.size for x in trained) == 8 * 2 + 2 * 8 + 8 * 2
  # The scale: the head as it was is not read.
  assert len(jax.tree.leaves(base.rest)) == 1


def test_the_base_is_an_argument_that_is_neither_donated_nor_changed():
  train, state, base = _start()
  before = jax.tree.map(np.array, base)
  buffers = jax.tree.leaves(state.trained)
  train(state, base, _batch())
  assert all(x.is_deleted() for x in buffers)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, base), before)


def test_no_gradient_of_a_frozen_leaf_is_in_the_program():
  train, state, base = _start()
  text = str(jax.make_jaxpr(train)(state, base, _batch()))
  made = [line.split(" = ")[0] for line in text.splitlines() if " = " in line]
  assert not [left for left in made if "f32[50,8]" in left]  # The embedding's shape.
  assert [left for left in made if "f32[8,2]" in left]  # Trained: there are some.


def test_dropout_follows_from_key_and_step():
  train, state, base = _start(dropout=True, rate=0.0)
  state, first = train(state, base, _batch())
  state, second = train(state, base, _batch())
  again, other, base = _start(dropout=True, rate=0.0)
  other, same = again(other, base, _batch())
  # The learning rate is zero: all that differs is the dropout.
  assert first["loss"].value() == same["loss"].value()
  assert first["loss"].value() != second["loss"].value()


def test_a_step_counts_and_reports_means():
  train, state, base = _start(rate=0.25)
  state, metrics = train(state, base, _batch())
  assert int(state.step) == 1
  assert set(metrics) == {"loss", "grad_norm", "learning_rate"}
  assert float(metrics["loss"].count) == 8
  assert metrics["learning_rate"].value() == 0.25


def test_trained_leaves_are_float32_masters():
  job = toy.job()
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), job.runs[0].adapter)
  optimizer = optim.optimizer(
    lambda step: jnp.float32(0.1), b1=0.9, b2=0.9, eps=1e-8, weight_decay=0, grad_clip=1
  )
  state, _ = states.create(job.model.params, low, optimizer, jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}


def test_a_tuned_leaf_that_shares_the_bases_buffer_is_copied():
  job = toy.job()
  leaf = job.model.params["head"]["kernel"]
  adapter = job.runs[0].adapter | {"head/kernel": Tuned(leaf, leaf)}
  rate = lambda step: jnp.float32(0.1)
  optimizer = optim.optimizer(
    rate, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0, grad_clip=1.0
  )
  state, base = states.create(job.model.params, adapter, optimizer, jax.random.key(0))
  train = step.train_step(job.model.forward, job.objective.loss, optimizer, rate)
  step.jitted(train)(state, base, _batch())
  assert not leaf.is_deleted()
