"""DoRA and LoRA with a bias, against PEFT in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import lorax_flax as lx
from tests.adapt.checks import check_no_dense_gradient, perturbed
from tests.methods.layers import FUNCTIONS, inputs


class Layer(torch.nn.Module):
  def __init__(self, kind):
    super().__init__()
    self.target = {
      "linear": lambda: torch.nn.Linear(5, 7),
      "embedding": lambda: torch.nn.Embedding(11, 5),
      "conv": lambda: torch.nn.Conv2d(5, 7, (3, 2)),
    }[kind]()

  def forward(self, x):
    return self.target(x)


def ours(kind, x, **kwargs):
  """A torch layer under PEFT with moved factors, and the same here."""
  torch.manual_seed(0)
  config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["target"], **kwargs)
  model = peft.get_peft_model(Layer(kind), config)
  base = model.base_model.model.target.base_layer
  kernel = base.weight.detach().numpy()
  params = {"kernel": jnp.asarray(kernel.T if kind == "linear" else kernel)}
  if kind != "embedding":
    params["bias"] = jnp.asarray(base.bias.detach().numpy())
  lora = lx.adapt(
    FUNCTIONS[kind], lx.LoraConfig(rank=2, alpha=6, targets="kernel", **kwargs)
  )
  return model, params, lora, lora.init(jax.random.key(0), params, x)


@pytest.mark.parametrize(
  ("kind", "field"),
  [
    ("linear", "use_dora"),
    ("embedding", "use_dora"),
    ("conv", "use_dora"),
    ("linear", "lora_bias"),
    ("conv", "lora_bias"),
  ],
)
def test_value_and_gradient_equal_pefts(kind, field):
  x = inputs(kind)
  model, params, lora, adapter = ours(kind, x, **{field: True})
  np.testing.assert_allclose(
    lora.apply(params, adapter, x), FUNCTIONS[kind](params, x), rtol=1e-5, atol=1e-6
  )
  their = {n: p for n, p in model.named_parameters() if "lora_" in n}

  def find(part):
    ends = {
      "a": ("lora_A.default.weight", "lora_embedding_A.default"),
      "b": ("lora_B.default.weight", "lora_embedding_B.default"),
      "magnitude": ("lora_magnitude_vector.default.weight",),
      "bias": ("lora_B.default.bias",),
    }[part]
    return next(p for n, p in their.items() if n.endswith(ends))

  moved = perturbed(adapter)["kernel"]
  for part in moved.trained:
    with torch.no_grad():
      find(part).copy_(torch.tensor(laid_out(getattr(moved, part), part, find(part))))
  trained, rest = lx.partition({"kernel": moved}, lx.trainable_mask(adapter))

  def loss(t):
    out = lora.apply(params, lx.combine(t, rest), x)
    return jnp.sin(out).sum(), out

  (_, out), got = jax.value_and_grad(loss, has_aux=True)(trained)
  theirs = model(torch.tensor(x))
  torch.sin(theirs).sum().backward()
  np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)
  for part in moved.trained:
    want = find(part).grad.numpy()
    grad = laid_out(getattr(got["kernel"], part), part, find(part))
    np.testing.assert_allclose(grad, want, rtol=1e-3, atol=1e-4, err_msg=part)
  check_no_dense_gradient(lora, params, {"kernel": moved}, x)
  merged = lx.merge(params, {"kernel": moved})
  np.testing.assert_allclose(out, FUNCTIONS[kind](merged, x), rtol=1e-4, atol=1e-4)


def laid_out(value, part, like):
  """A part of ours as PEFT lays it out."""
  value = np.asarray(value)
  if part in ("a", "b"):
    value = np.moveaxis(value, -1, 0)
  return np.ascontiguousarray(value.reshape(like.shape))
