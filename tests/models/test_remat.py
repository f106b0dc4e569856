"""Remat policies: the same gradients, from no more kept values than a policy names."""

import contextlib
import io
import re
from collections import Counter
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import lorax_flax as lx
from lorax_flax.errors import LoraxError
from lorax_flax.models import registry, stacking
from lorax_flax.models.ops import splash
from lorax_flax.models.remat import POLICIES, REMAT
from lorax_flax.models.settings import ModelSettings

B, T, D, LAYERS = 2, 16, 24, 2
SIZES = {
  "hidden_size": D,
  "vocab_size": 37,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": 4,
}
CONFIGS = {
  "llama": {
    **SIZES,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": T,
  },
  "bert": {
    **SIZES,
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "intermediate_size": 56,
    "hidden_act": "gelu",
    "max_position_embeddings": T,
    "type_vocab_size": 2,
  },
}
IDS = np.random.default_rng(0).integers(3, 37, (B, T)).astype(np.int32)
# Number of features of what each policy keeps of a layer beside its input: queries or
# the output (24), keys and values (12), gate and up (40); queries, keys, values, and
# the results of attention's output and of the feed-forward part (24), and up (56).
ATTENTION = {"llama": [24, 12, 12, 24], "bert": [24, 24, 24, 24, 24]}
MLP = {"llama": [40, 40], "bert": [56]}
# Number of results of attention's output and of the feed-forward part that are needed.
OFFLOADED = {"llama": 1, "bert": 2}


@cache
def losses(family, scan):
  """A loss of an adapter by policy, and the adapter."""
  ones, rngs = jnp.ones_like(IDS), {"dropout": jax.random.key(2)}

  def adapted(remat):
    config = CONFIGS[family] | {"num_hidden_layers": LAYERS if scan else 1}
    module = registry.outline(config, scan=scan, remat=remat).module

    def run(params, ids):
      return module.apply({"params": params}, ids, ones, deterministic=False, rngs=rngs)

    return module, lx.adapt(run, lx.LoraConfig(rank=2, targets="all-linear"))

  def loss(lora, adapter):
    return jnp.sum(jnp.sin(lora.apply(params, adapter, IDS)))

  module, lora = adapted("none")
  params = nn.unbox(jax.jit(module.init)(jax.random.key(0), IDS, ones))["params"]
  adapter = lora.init(jax.random.key(1), params, IDS)
  adapter = jax.tree.map(lambda x: x + 0.05 if x.ndim > 1 else x, adapter)
  return {remat: partial(loss, adapted(remat)[1]) for remat in REMAT}, adapter


@pytest.mark.parametrize("scan", [False, True], ids=["looped", "scanned"])
@pytest.mark.parametrize("family", CONFIGS)
def test_each_policy_has_the_same_loss_and_gradients(family, scan):
  loss_of, adapter = losses(family, scan)
  run = jax.jit(lambda a: {n: jax.value_and_grad(f)(a) for n, f in loss_of.items()})
  found = run(adapter)
  want = found.pop("none")
  assert min(np.abs(x).max() for x in jax.tree.leaves(want[1])) > 0
  for name, got in found.items():
    jax.tree.map(
      lambda x, y, name=name: np.testing.assert_allclose(
        x, y, rtol=1e-6, atol=5e-6 * np.abs(y).max(), err_msg=name
      ),
      got,
      want,
    )


def residuals(run, *args):
  """What JAX prints of the values kept for the backward pass."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    print_saved_residuals(run, *args)
  return out.getvalue()


def kept(loss, adapter):
  """Counts of (memory, features) of the activations that scanned layers keep."""
  shape = rf"\[{LAYERS},{B},{T},(\d+)\]"
  found = re.findall(
    rf"^f32(<host>)?{shape} output of scan", residuals(loss, adapter), re.M
  )
  return Counter((memory or "device", int(size)) for memory, size in found)


@pytest.mark.parametrize("remat", POLICIES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_policy_keeps_what_it_names_and_nothing_else(family, remat):
  loss_of, adapter = losses(family, True)
  where = "<host>" if remat.startswith("offload") else "device"
  want = Counter({(where, D): 1})
  if remat in ("inputs", "attention"):
    want.update(("device", size) for size in ATTENTION[family])
  if remat == "offload_attention":
    want.update({("<host>", D): OFFLOADED[family]})
  if remat == "inputs":
    want.update(("device", size) for size in MLP[family])
  assert kept(loss_of[remat], adapter) == want


@pytest.mark.parametrize(("remat", "number"), [("full", 0), ("attention", 2)])
def test_the_results_of_attentions_kernel_are_kept(remat, number):
  q, mask = jnp.ones((1, 128, 2, 16)), jnp.ones((1, 128), jnp.int32)
  options = {"causal": True, "window": None, "softcap": None, "scale": 1.0}
  run = jax.checkpoint(
    lambda q: splash.attention(q, q, q, mask, **options, interpret=True),
    policy=stacking.policy(remat),
  )
  # The result and the softmax's sums: with both the kernel need not run again.
  found = re.findall(r"^f32\[1,2,128(?:,16)?\]", residuals(run, q), re.M)
  assert len(found) == number


def test_an_unknown_policy_is_refused_with_the_nearest():
  with pytest.raises(LoraxError, match=r"model\.remat.*'input'.*'inputs'"):
    ModelSettings(path="x", remat="input")
  with pytest.raises(LoraxError, match=r"remat.*offload"):
    registry.outline(CONFIGS["llama"], remat="ofload")
