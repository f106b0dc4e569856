"""`lx.fit`: an adapter of any function, trained in one call."""

import json

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax_flax as lx
from lorax_flax.errors import LoraxError
from lorax_flax.sharding.mesh import MeshConfig
from lorax_flax.train.checkpoint import Checkpoints
from tests.train.stopping import Stopped

IN, HIDDEN, OUT = 6, 16, 3
SETTINGS = {"steps": 30, "learning_rate": 0.03, "log_steps": 5, "save_steps": 4}


def _batches(count=10, rows=8, seed=0):
  """Inputs, and what a network of other weights makes of them."""
  rng = np.random.default_rng(seed)
  w = np.random.default_rng(9).normal(size=(IN, OUT))
  for _ in range(count):
    x = rng.normal(size=(rows, IN)).astype(np.float32)
    yield {"x": x, "y": np.tanh(x @ w).astype(np.float32)}


def _loss(outputs, batch):
  return jnp.square(outputs - batch["y"]).mean(-1)


def _plain():
  keys = jax.random.split(jax.random.key(0))
  params = {
    "up": jax.random.normal(keys[0], (IN, HIDDEN)) * 0.5,
    "down": jax.random.normal(keys[1], (HIDDEN, OUT)) * 0.3,
  }
  return params, lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], ["up", "down"]


def _linen():
  model = nn.Sequential([nn.Dense(HIDDEN), nn.tanh, nn.Dense(OUT)])
  params = model.init(jax.random.key(0), jnp.zeros((1, IN)))["params"]
  return params, lambda p, x: model.apply({"params": p}, x), "all-linear"


def _nnx():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(IN, HIDDEN, rngs=rngs), nnx.tanh, nnx.Linear(HIDDEN, OUT, rngs=rngs)
  )
  graph, state = nnx.split(model)
  return state, lambda p, x: nnx.merge(graph, p)(x), "all-linear"


def _lora(apply_fn, targets):
  config = lx.LoraConfig(rank=4, alpha=8.0, targets=targets, dropout=0.1)
  return lx.adapt(apply_fn, config)


def _inputs(batch):
  return (batch["x"],)


def _score(lora, params, adapter):
  [batch] = _batches(1, 64, seed=5)
  return float(_loss(lora.apply(params, adapter, batch["x"]), batch).mean())


@pytest.mark.parametrize("make", [_plain, _linen, _nnx])
def test_any_function_is_trained(make):
  params, apply_fn, targets = make()
  lora = _lora(apply_fn, targets)
  before = jax.tree.map(np.array, params)
  held_out = list(_batches(2, 16, seed=5))
  fitted = lx.fit(
    lora,
    params,
    list(_batches()),
    _loss,
    inputs=_inputs,
    evaluation=held_out,
    **SETTINGS,
  )
  start = lora.init(jax.random.key(0), params, next(_batches())["x"])
  assert _score(lora, params, fitted.adapter) < 0.5 * _score(lora, params, start)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, params), before)
  losses = [x["eval/loss"] for x in fitted.history if "eval/loss" in x]
  assert len(losses) == 3
  assert fitted.result["eval_loss"] == min(losses)
  assert fitted.result["examples_evaluated"] == 32
  assert fitted.result["examples"] == 30 * 8
  outputs = [lora.apply(params, fitted.adapter, b["x"]) for b in held_out]
  means = [_loss(o, b).mean() for o, b in zip(outputs, held_out, strict=True)]
  assert fitted.result["eval_loss"] == pytest.approx(np.mean(means), rel=1e-4)


def test_a_tuple_and_a_mean_loss_train_as_a_dict_and_losses_of_examples():
  params, apply_fn, targets = _plain()
  lora = _lora(apply_fn, targets)
  by_name = lx.fit(lora, params, list(_batches()), _loss, inputs=_inputs, **SETTINGS)
  pairs = [(batch["x"], batch["y"]) for batch in _batches()]
  mean = lambda outputs, batch: jnp.square(outputs - batch[1]).mean()
  by_place = lx.fit(lora, params, pairs, mean, **SETTINGS)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    by_name.adapter,
    by_place.adapter,
  )
  assert by_name.result["best_step"] == 30


def test_where_nothing_is_evaluated_an_epoch_ends_without_a_checkpoint(monkeypatch):
  params, apply_fn, targets = _plain()
  steps, save = [], Checkpoints.save
  saved = lambda self, step, *state: steps.append(step) or save(self, step, *state)
  monkeypatch.setattr(Checkpoints, "save", saved)
  one_a_epoch = list(_batches(1))
  changes = SETTINGS | {"steps": 6}
  lx.fit(
    _lora(apply_fn, targets), params, one_a_epoch, _loss, inputs=_inputs, **changes
  )
  assert steps == [4, 6]


def test_on_a_mesh_it_trains_as_on_one_device(monkeypatch):
  if len(jax.devices()) > 1:
    pytest.skip("the other device is to be this one")
  params, apply_fn, targets = _plain()
  lora = _lora(apply_fn, targets)
  one = lx.fit(lora, params, list(_batches()), _loss, inputs=_inputs, **SETTINGS)
  all_ = lx.fit(
    *(lora, params, list(_batches()), _loss),
    inputs=_inputs,
    mesh=MeshConfig(),
    axes={"up": ("embed", "mlp"), "down": ("mlp", "labels")},
    **SETTINGS,
  )
  jax.tree.map(np.testing.assert_array_equal, one.adapter, all_.adapter)


class _Position:
  """Batches whose iterator has a position of its own; they may end the run."""

  def __init__(self, last=None, stateful=True):
    self._all, self._last = list(_batches()), last
    self.stateful, self.read = stateful, 0

  def __len__(self):
    return len(self._all)

  def __iter__(self):
    return (_Stateful if self.stateful else _Counted)(self)

  def at(self, number):
    self.read += 1
    if self._last is not None and self.read > self._last:
      raise Stopped
    return self._all[number]


class _Counted:
  def __init__(self, batches):
    self._batches, self._number = batches, 0

  def __iter__(self):
    return self

  def __next__(self):
    if self._number == len(self._batches):
      raise StopIteration
    self._number += 1
    return self._batches.at(self._number - 1)


class _Stateful(_Counted):
  def get_state(self):
    return {"number": self._number}

  def set_state(self, state):
    self._number = state["number"]


@pytest.mark.parametrize("stateful", [True, False])
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, stateful):
  params, apply_fn, targets = _plain()
  lora = _lora(apply_fn, targets)
  held_out = list(_batches(2, 16, seed=5))
  fit = lambda batches, folder: lx.fit(
    *(lora, params, batches, _loss),
    inputs=_inputs,
    evaluation=held_out,
    workdir=folder,
    **SETTINGS,
  )
  straight = fit(_Position(stateful=stateful), tmp_path / "straight")
  for last in (14, 9 if stateful else 20):
    with pytest.raises(Stopped):
      fit(_Position(last, stateful), tmp_path / "killed")
  batches = _Position(stateful=stateful)
  resumed = fit(batches, tmp_path / "killed")
  # By the iterator's own position no batch is read again, but for the first.
  assert (batches.read < 15) == stateful
  assert resumed.history == straight.history
  jax.tree.map(np.testing.assert_array_equal, resumed.adapter, straight.adapter)
  names = ("metrics.jsonl", "config.json")
  for name in names:
    texts = [(tmp_path / f / name).read_text() for f in ("straight", "killed")]
    assert texts[0] == texts[1]
  again = fit(_Position(stateful=stateful), tmp_path / "killed")
  jax.tree.map(np.testing.assert_array_equal, again.adapter, straight.adapter)
  result = json.loads((tmp_path / "killed/result.json").read_text())
  assert result["adapter"] == str(tmp_path / "killed/adapter")
  card = huggingface_hub.ModelCard.load(tmp_path / "killed/adapter/README.md")
  assert card.data.library_name == "lorax_flax"
  assert card.data.eval_results[0].metric_value == result["eval_loss"]
  assert (tmp_path / "killed/report.html").is_file()


@pytest.mark.parametrize(
  ("batches", "changes", "message"),
  [
    ([], {}, "there are no batches"),
    ([(np.ones((2, IN)), np.ones(3))], {}, "no common leading axis"),
    ([{"x": np.ones((2, IN))}, np.ones((2, IN))], {}, "differ in structure"),
    (iter(list(_batches(3))), {}, "iterator over batches ended after 3"),
    (list(_batches(3)), {"lerning_rate": 1.0}, "did you mean 'learning_rate'"),
    (iter(list(_batches(3))), {"steps": None, "epochs": 2}, "give steps, not epochs"),
    (list(_batches(3)), {"accumulation": 3}, "can't be split into"),
    (list(_batches(3, rows=9)), {"batch_size": 8, "accumulation": 2}, "evenly"),
  ],
)
def test_what_can_not_be_trained_is_an_error(batches, changes, message):
  params, apply_fn, targets = _plain()
  loss = lambda outputs, batch: jnp.square(outputs).mean(-1)
  with pytest.raises(LoraxError, match=message):
    lx.fit(
      *(_lora(apply_fn, targets), params, batches, loss),
      inputs=lambda batch: (batch["x"],),
      **(SETTINGS | changes),
    )


def test_a_loss_of_another_shape_is_an_error():
  params, apply_fn, targets = _plain()
  loss = lambda outputs, batch: jnp.square(outputs - batch["y"])
  with pytest.raises(LoraxError, match=r"the loss has shape \(8, 3\)"):
    lx.fit(
      _lora(apply_fn, targets),
      params,
      list(_batches()),
      loss,
      inputs=_inputs,
      **SETTINGS,
    )
