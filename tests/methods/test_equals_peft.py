"""Every method against PEFT in torch: value, merged weight, and three steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import lorax_flax as lx
from lorax_flax.adapt.training import scheduled
from lorax_flax.adapt.training import size as training_size
from tests.adapt.checks import check_no_dense_gradient
from tests.methods import peft_methods as peers
from tests.methods.layers import FUNCTIONS
from tests.methods.steps import clipped_adamw, trained_beside

IN, OUT, LEARNING_RATE = 12, 8, 1e-2


class Layer(torch.nn.Module):
  def __init__(self, kind):
    super().__init__()
    torch.manual_seed(0)
    shape = {"linear": (IN, OUT), "embedding": (11, OUT)}[kind]
    self.target = {"linear": torch.nn.Linear, "embedding": torch.nn.Embedding}[kind](
      *shape
    )

  def forward(self, x):
    return self.target(x)


def inputs(kind):
  if kind == "embedding":
    return np.array([[1, 3, 3], [10, 0, 4]])
  return np.random.default_rng(0).normal(size=(5, IN)).astype("f4")


CASES = [
  (name, kind)
  for name in peers.PEERS
  for kind in ("linear", "embedding")
  if peers.keys(name, kind)
]


def both(name, kind):
  """PEFT's model, and ours with its leaves."""
  model, x = peers.model(name, Layer(kind)), inputs(kind)
  base = next(m for n, m in model.named_modules() if n.endswith("target.base_layer"))
  weight = base.weight.detach().numpy().copy()
  params = {"kernel": jnp.asarray(weight.T if kind == "linear" else weight)}
  if kind == "linear":
    params["bias"] = jnp.asarray(base.bias.detach().numpy())
  lora = lx.adapt(FUNCTIONS[kind], peers.config(name))
  adapter = lora.init(jax.random.key(0), params, x)
  if peers.PEERS[name].starts_at_base:
    np.testing.assert_allclose(
      lora.apply(params, adapter, x), FUNCTIONS[kind](params, x), atol=1e-6
    )
  values = peers.ours(name, kind, peers.leaves(name, kind, model))
  given = values | peers.shared(name, model)
  values |= {n: given[n] for n in adapter["kernel"].common}
  moved = dataclasses.replace(
    adapter["kernel"], **{n: jnp.asarray(v) for n, v in given.items()}
  )
  assert {n: v.shape for n, v in values.items()} == {
    n: getattr(adapter["kernel"], n).shape for n in moved.trained
  }
  return model, params, lora, {"kernel": moved}, x


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_value_merged_weight_and_three_steps_equal_pefts(name, kind):
  model, params, lora, adapter, x = both(name, kind)
  if not peers.PEERS[name].formed:
    check_no_dense_gradient(lora, params, adapter, x)
  end = trained_beside(lora, params, adapter, model, x, LEARNING_RATE)
  wanted = peers.ours(name, kind, peers.leaves(name, kind, model))
  wanted |= peers.shared(name, model)
  for leaf, value in wanted.items():
    np.testing.assert_allclose(
      getattr(end["kernel"], leaf), value, rtol=1e-4, atol=1e-5, err_msg=leaf
    )
  with torch.no_grad():
    out = model(torch.tensor(x)).numpy()
    merged = model.merge_and_unload().target.weight.numpy()
  np.testing.assert_allclose(lora.apply(params, end, x), out, rtol=1e-4, atol=1e-5)
  ours = lx.merge(params, end)
  back = lx.unmerge(ours, end)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), back, params)
  kernel = ours["kernel"]
  np.testing.assert_allclose(
    kernel.T if kind == "linear" else kernel, merged, rtol=1e-4, atol=1e-5
  )


def test_the_projections_of_vera_are_pefts_for_kernels_of_unlike_shapes():
  model = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Linear(4, 9))
  config = peft.VeraConfig(r=5, target_modules=["0", "1"], projection_prng_key=3)
  theirs = peft.get_peft_model(model, config).base_model
  params = {"up": jnp.ones((12, 4)), "down": jnp.ones((4, 9))}
  ours = lx.LoraConfig(
    targets=["up", "down"], method="vera", rank=5, options={"projection_prng_key": 3}
  )
  lora = lx.adapt(lambda p, x: x @ p["up"] @ p["down"], ours)
  adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 12)))
  first, second = (x["default"].numpy() for x in (theirs.vera_A, theirs.vera_B))
  for path, (fan_in, fan_out) in {"up": (12, 4), "down": (4, 9)}.items():
    delta = adapter[path]
    np.testing.assert_allclose(delta.a, first[:, :fan_in].T, atol=1e-7)
    np.testing.assert_allclose(delta.b, second[:fan_out].T, atol=1e-6)


def test_a_bank_of_all_targets_takes_one_step_as_pefts_does():
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Linear(4, 8))
  weights = {
    n: model[i].weight.detach().T.numpy() for i, n in enumerate(("up", "down"))
  }
  biases = [layer.bias.detach().numpy()[None] for layer in model]
  fields = {"num_vectors": 5, "vector_length": 4}
  theirs = peft.get_peft_model(
    model, peft.VBLoRAConfig(r=3, target_modules=["0", "1"], **fields)
  )
  params = {name: jnp.asarray(w) for name, w in weights.items()}
  lora = lx.adapt(
    lambda p, x: (x @ p["up"] + biases[0]) @ p["down"] + biases[1],
    lx.LoraConfig(targets=["up", "down"], method="vblora", rank=3, options=fields),
  )
  x = inputs("linear")
  adapter = lora.init(jax.random.key(0), params, x)
  np.testing.assert_array_equal(adapter["up"].bank, adapter["down"].bank)
  assert 0.01 < jnp.abs(adapter["up"].bank).max() < 0.02
  assert 0.07 < adapter["up"].logits_a.std() < 0.13
  bank = theirs.base_model.vblora_vector_bank["default"]
  with torch.no_grad():
    bank.mul_(20)
    for i, name in enumerate(("up", "down")):
      layer = theirs.base_model.model[i]
      adapter[name] = dataclasses.replace(
        adapter[name],
        logits_a=jnp.asarray(layer.vblora_logits_A["default"].numpy().copy()),
        logits_b=jnp.asarray(layer.vblora_logits_B["default"].numpy().copy()),
        bank=jnp.asarray(bank.numpy().copy()),
      )
  optimizer = scheduled(clipped_adamw(LEARNING_RATE, 0.5), adapter)
  end = trained_beside(
    lora, params, adapter, theirs, x, LEARNING_RATE, optimizer, clip=0.5
  )
  np.testing.assert_array_equal(end["up"].bank, end["down"].bank)
  np.testing.assert_allclose(end["up"].bank, bank.detach().numpy(), atol=1e-6)
  for i, name in enumerate(("up", "down")):
    logits = theirs.base_model.model[i].vblora_logits_B["default"]
    np.testing.assert_allclose(end[name].logits_b, logits.detach().numpy(), atol=1e-5)
  # The bank is one parameter of the two targets.
  assert training_size(end) == sum(
    p.numel() for p in theirs.parameters() if p.requires_grad
  )
