"""Models whose kernels are quantised as they are read, and runs on them."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import transformers

import lorax_flax as lx
from experiments import run
from lorax_flax import quant
from lorax_flax.adapt.paths import flatten, map_with_path
from lorax_flax.hub.checkpoints import quantized
from lorax_flax.models import registry
from tests.experiments import own_text
from tests.models import family
from tests.quant import checkpoints

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bert")
  config = transformers.BertConfig(**SIZES, num_labels=3)
  family.save(folder, transformers.BertForSequenceClassification(config))
  return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llama")
  own_text.decoder(folder, width=128)
  return folder


def dequantised(loaded):
  return map_with_path(lambda _, leaf: quant.dense(leaf), loaded.params)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_is_quantised_as_its_kernels_would_be(name, scan, request):
  folder = request.getfixturevalue(name)
  loaded = registry.load(folder, scan=scan, quant="nf4")
  dense, got = (
    flatten(registry.load(folder, scan=scan).params),
    flatten(loaded.params),
  )
  chosen = quantized.kernels(loaded.keymap)
  assert {path for path, leaf in got.items() if quant.is_quantized(leaf)} == chosen
  assert not any("embed" in p or "head" in p or "classifier" in p for p in chosen)
  assert sum(path.endswith("kernel") for path in chosen) in (6, 7, 12, 14)
  for path, leaf in got.items():
    same = quant.quantize(dense[path], "nf4") if path in chosen else dense[path]
    for x, y in zip(jax.tree.leaves(leaf), jax.tree.leaves(same), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-6)
  ids, mask = family.tokens(9, 4, 40)
  inputs = {"input_ids": ids, "attention_mask": mask}
  apply = lambda params, x: loaded.module.apply({"params": params}, **x)
  adapted = lx.adapt(apply, lx.LoraConfig(targets="all-linear", rank=2))
  adapter = adapted.init(jax.random.key(0), loaded.params, inputs)
  assert set(adapter) >= chosen
  run = jax.jit(adapted.apply)
  np.testing.assert_array_equal(
    run(loaded.params, adapter, inputs), run(dequantised(loaded), adapter, inputs)
  )


def test_a_kernel_that_does_not_fit_is_named(tmp_path):
  own_text.decoder(tmp_path)
  with pytest.raises(lx.LoraxError, match=r"quant int4: 'model/layer_0.*block of 64"):
    registry.load(tmp_path, quant="int4")
  with pytest.raises(lx.LoraxError, match="unknown quant 'nf5'"):
    registry.load(tmp_path, quant="nf5")


def settings(base, data, **changes):
  changes = {"train.steps": 3, "lora.targets": "all-linear"} | changes
  config = own_text.shrunk("complete.py", base, data, **changes)
  return config.settings() if hasattr(config, "settings") else config


def test_three_steps_are_those_of_the_dequantised_base(llama, tmp_path):
  checkpoints.write_dense(tmp_path / "dense", llama, "nf4")
  data = own_text.write(tmp_path / "data", own_text.completions)
  losses = {}
  for base, name in ((llama, "nf4"), (tmp_path / "dense", None)):
    made = settings(base, data, **{"model.quant": name})
    workdir = tmp_path / str(name)
    result = run.run(made, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    losses[name] = [x["train/loss"] for x in rows if "train/loss" in x]
    assert run.run(made, workdir) == result  # The finished run is found again.
  assert len(losses["nf4"]) >= 3
  np.testing.assert_allclose(losses["nf4"], losses[None], rtol=1e-5)
  assert "nf4" in (tmp_path / "nf4" / "adapter" / "README.md").read_text()
  with pytest.raises(lx.LoraxError, match=r"model\.quant is"):
    run.run(settings(llama, data, **{"model.quant": "int8"}), tmp_path / "nf4")


def test_shards_follow_the_kernels(llama):
  found = subprocess.run(
    [sys.executable, "-m", "tests.quant.mesh_worker", llama],
    env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    timeout=600,
  )
  cases = json.loads(found.stdout.splitlines()[-1])
  (first, *others), error = cases["logits"], cases["error"]
  for logits in others:
    np.testing.assert_allclose(logits, first, atol=2e-4)
  assert cases["codes"] == ["tensor", "fsdp"]
  assert "can't be split into the 4 of mesh.fsdp" in error
  assert "kernel" in error
