"""Starts that are a part of the kernel, or orthogonal, against PEFT's."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga

import lorax_flax as lx
from lorax_flax.adapt.algebra import as_lora
from lorax_flax.adapt.gradients import mean_gradients
from lorax_flax.hub.peft import config_file
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.quant import dense, quantize
from lorax_flax.train.trials import own_and_shared
from tests.adapt.checks import check_no_dense_gradient, perturbed
from tests.hub.peft import peers
from tests.methods.steps import trained_beside

IN, OUT, RANK, ALPHA, LEARNING_RATE = 12, 8, 3, 6, 1e-2
NAMES = ("pissa", "olora")
X = np.random.default_rng(0).normal(size=(5, IN)).astype("f4")


def apply(params, x):
  return x @ params["kernel"]


def started(name, params):
  config = lx.LoraConfig(targets="kernel", method=name, rank=RANK, alpha=ALPHA)
  lora = lx.adapt(apply, config)
  return lora, lora.init(jax.random.key(0), params, X)


@pytest.fixture(scope="module")
def linear():
  torch.manual_seed(0)
  return torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))


@pytest.mark.parametrize("name", NAMES)
def test_a_start_inside_the_kernel_trains_as_pefts(name, linear):
  params = {"kernel": jnp.asarray(linear[0].weight.detach().numpy().T)}
  lora, adapter = started(name, params)
  np.testing.assert_array_equal(lora.apply(params, adapter, X), apply(params, X))
  config = peft.LoraConfig(
    r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=name
  )
  model = peft.get_peft_model(copy.deepcopy(linear), config)
  theirs = [p for p in model.parameters() if p.requires_grad]
  first, second = (p.detach().numpy() for p in theirs)
  delta = adapter["kernel"]
  np.testing.assert_allclose(delta.a @ delta.b, (second @ first).T, atol=1e-5)
  check_no_dense_gradient(lora, params, perturbed(adapter), X)

  trained, _ = lx.partition(adapter, lx.trainable_mask(adapter))
  assert len(jax.tree.leaves(trained)) == 2
  end = trained_beside(lora, params, adapter, model, X, LEARNING_RATE)
  merged = lx.merge(params, end)["kernel"]
  want = model.merge_and_unload()[0].weight.detach().numpy()
  assert np.abs(merged - params["kernel"]).max() > 1e-3
  np.testing.assert_allclose(merged.T, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["stable", "gd_scale", "unit"])
def test_a_start_from_gradients_is_pefts_and_trains_as_it(scaling, linear):
  rank, batches = 2, [X, X[:3] ** 2, X + 1]
  params = {"kernel": jnp.asarray(linear[0].weight.detach().numpy().T)}
  options = {"scaling": scaling}
  config = lx.LoraConfig(
    targets="kernel", method="lora_ga", rank=rank, alpha=ALPHA, options=options
  )
  lora = lx.adapt(apply, config)
  loss = lambda params, x: jnp.sin(apply(params, x)).sum()
  key = jax.random.key(0)
  adapter = lx.init_from_gradients(lora, key, params, loss, batches, X)
  np.testing.assert_array_equal(lora.apply(params, adapter, X), apply(params, X))

  base = copy.deepcopy(linear)
  theirs = peft.LoraConfig(
    r=rank,
    lora_alpha=ALPHA,
    target_modules=["0"],
    init_lora_weights="lora_ga",
    lora_ga_config=peft.LoraGAConfig(scale=scaling),
  )

  def step():
    for x in batches:
      # Their hook counts a module's gradients where its input has one.
      torch.sin(base(torch.tensor(x, requires_grad=True))).sum().backward()

  preprocess_loraga(base, theirs, step)
  model = peft.get_peft_model(base, theirs)
  first, second = (
    np.array(p.detach().numpy()) for p in model.parameters() if p.requires_grad
  )
  delta = adapter["kernel"]
  # Of singular directions, the signs are the decomposition's choice.
  np.testing.assert_allclose(np.abs(delta.a), np.abs(first.T), atol=1e-4)
  np.testing.assert_allclose(np.abs(delta.b), np.abs(second.T), rtol=1e-3, atol=1e-4)
  same = {"a": jnp.asarray(first.T), "b": jnp.asarray(second.T)}
  starts = {f"start_{name}": x for name, x in same.items()}
  adapter = {"kernel": dataclasses.replace(delta, **same, **starts)}
  end = trained_beside(lora, params, adapter, model, X, LEARNING_RATE)
  want = model.merge_and_unload()[0].weight.detach().numpy()
  merged = lx.merge(params, end)["kernel"]
  np.testing.assert_allclose(merged.T, want, rtol=1e-4, atol=1e-5)


def test_mean_gradients_are_of_the_chosen_leaves_of_a_quantised_base_too():
  kernel = jnp.asarray(np.random.default_rng(3).normal(size=(IN, OUT)), jnp.float32)
  stored = quantize(kernel, "int8")
  params = {"kernel": stored, "other": jnp.ones((OUT, 2))}
  loss = lambda p, x: jnp.sin(x @ dense(p["kernel"]) @ p["other"]).sum()
  found = mean_gradients(loss, params, [X, X[:2]], ["kernel"])
  assert found.keys() == {"kernel"}
  each = [
    jax.grad(lambda w, x=x: loss({**params, "kernel": w}, x))(stored.dense())
    for x in (X, X[:2])
  ]
  np.testing.assert_allclose(found["kernel"], sum(each) / 2, rtol=1e-5, atol=1e-6)
  with pytest.raises(lx.LoraxError, match="there is no batch"):
    mean_gradients(loss, params, [], ["kernel"])


@pytest.mark.parametrize("name", [*NAMES, "lora_ga", "corda"])
def test_a_folder_is_a_lora_of_twice_the_rank(name, tmp_path):
  bert = peers.tiny_classifier("bert")
  keymap = peers.bert_keymap(bert, scan=True)
  tree = peers.params(bert, keymap)
  config = lx.LoraConfig(method=name, rank=RANK, alpha=ALPHA)
  rng = np.random.default_rng(0)
  (path,) = (p for p in keymap.keys if p.endswith("query/kernel"))
  width = bert.config.hidden_size
  shapes = {"a": (peers.LAYERS, width, RANK), "b": (peers.LAYERS, RANK, width)}
  leaves = {
    f"{when}{leaf}": jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32)
    for leaf, shape in shapes.items()
    for when in ("", "start_")
  }
  roles = ("stack", "in", "out")
  delta = lx.METHODS[name](**leaves, scale=jnp.float32(ALPHA / RANK), roles=roles)
  ours = {path: delta}
  hub_peft.write_adapter(tmp_path / "out", ours, keymap, config, task_type=None)
  written = config_file.read(tmp_path / "out")
  assert (written.r, written.lora_alpha) == (2 * RANK, 2 * ALPHA)
  assert written.init_lora_weights is True
  merged = lx.merge(tree, ours)
  read, _ = hub_peft.read_adapter(tmp_path / "out", tree, keymap)
  peers.assert_same_leaves(lx.merge(tree, read), merged, atol=1e-5)
  theirs = peers.load(bert, tmp_path / "out").merge_and_unload()
  peers.assert_same_leaves(peers.params(theirs, keymap), merged, atol=1e-5)


def test_a_randomised_svd_finds_the_exact_directions():
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (60, 40))
  kernel = u[:, :40] * 2.0 ** -np.arange(40) @ v
  params = {"kernel": jnp.asarray(kernel, jnp.float32)}
  x = np.ones((2, 60), "f4")
  found = []
  for niter in (0, 4):
    config = lx.LoraConfig(
      targets="kernel", method="pissa", rank=RANK, options={"niter": niter}
    )
    delta = lx.adapt(apply, config).init(jax.random.key(1), params, x)["kernel"]
    found.append(delta.scale * delta.a @ delta.b)
  np.testing.assert_allclose(*found, atol=1e-5)
  best, _ = as_lora({"kernel": jnp.zeros((60, 40))}, {"kernel": full(kernel)}, RANK)
  np.testing.assert_allclose(found[0], best["kernel"].delta((60, 40)), atol=1e-5)


def full(kernel):
  """A matrix as a LoRA of full rank."""
  a, b = jnp.asarray(kernel, jnp.float32), jnp.eye(kernel.shape[1])
  return lx.LoRA(a, b, jnp.float32(1), ("in", "out"))


def test_an_orthogonal_start_changes_nothing_and_has_both_factors():
  params = {"kernel": jnp.ones((IN, OUT))}
  config = lx.LoraConfig(targets="kernel", init="orthogonal", rank=4)
  delta = lx.adapt(apply, config).init(jax.random.key(0), params, X)["kernel"]
  np.testing.assert_allclose(delta.a @ delta.b, np.zeros((IN, OUT)), atol=1e-7)
  # As of PEFT's: normal numbers over ten, of half the rank.
  for factor in (delta.a, delta.b):
    assert np.linalg.matrix_rank(factor) == 2
    assert 0.03 < np.std(factor) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_each_trial_has_a_start_of_its_own(name):
  params = {"kernel": jnp.ones((IN, OUT))}
  _, adapter = started(name, params)
  own, _ = own_and_shared(adapter)
  kept = {n for n, x in own["kernel"].leaves().items() if x is not None}
  assert {"scale", "start_a", "start_b"} <= kept
