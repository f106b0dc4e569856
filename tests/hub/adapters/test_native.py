"""Our own form of an adapter, for every method, and as earlier versions wrote it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.hub.adapters import native
from tests.adapt.checks import perturbed

PARAMS = {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5)), "table": jnp.eye(4)}
CLASSES = {"lora": "LoRA", "dora": "DoRA", "lora_bias": "BiasLoRA"}


def fn(params, ids):
  def layer(x, p):
    kernel, bias = p
    return jnp.tanh((x @ kernel + bias[None])[:, :4]), None

  stacked = params["kernel"], params["bias"]
  return jax.lax.scan(layer, params["table"][ids], stacked)[0]


@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("old", [False, True])
def test_an_adapter_comes_back_as_it_was(tmp_path, method, old):
  config = lx.LoraConfig(
    targets=("kernel",),
    method=method,
    rank=2,
    rank_pattern={"kernel": (1, 0, 2)},
    rows={"table": (2, 0)},
    tuned=("bias",),
    tuned_layers={"bias": (1,)},
  )
  lora = lx.adapt(fn, config)
  adapter = perturbed(lora.init(jax.random.key(0), PARAMS, jnp.arange(4)))
  native.write_adapter(tmp_path / "out", native.Saved(adapter, config))
  if old:
    _as_before(tmp_path / "out" / native.FILE, method)
  found = native.read_adapter(tmp_path / "out", PARAMS)
  assert found.config == config
  jax.tree.map(np.testing.assert_array_equal, found.adapter, adapter)


def _as_before(file, method):
  """Classes for methods, and switches in the config."""
  about = json.loads(file.read_text())
  names = CLASSES | {"token_rows": "Rows", "full": "Tuned"}
  for delta in about["deltas"].values():
    delta["method"] = names[delta["method"]]
  for name in ("method", "options"):
    del about["config"][name]
  about["config"] |= {"use_dora": method == "dora", "lora_bias": method == "lora_bias"}
  file.write_text(json.dumps(about))
