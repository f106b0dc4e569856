"""Adapters of parts of fused kernels, written for other libraries."""

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import lorax_flax as lx
from experiments.convert import convert
from lorax_flax.hub.adapters import fused, loralib, native
from lorax_flax.models import registry
from tests.adapt.checks import perturbed

IDS = np.array([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module", params=[False, True], ids=["looped", "scanned"])
def written(request, tmp_path_factory):
  """A tiny GPT-2, and a folder of our own form with a perturbed adapter."""
  folder = tmp_path_factory.mktemp("gpt2")
  torch.manual_seed(0)
  config = transformers.GPT2Config(
    vocab_size=12, n_positions=8, n_embd=6, n_layer=2, n_head=2, initializer_range=0.5
  )
  transformers.GPT2LMHeadModel(config).save_pretrained(folder)
  loaded = registry.load(folder, scan=request.param)
  config = lx.LoraConfig(targets=["c_attn"], method="fused_lora", rank=2, alpha=6)
  apply = lambda params, **x: loaded.module.apply({"params": params}, **x)
  inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
  lora = lx.adapt(apply, config)
  adapter = perturbed(lora.init(jax.random.key(0), loaded.params, **inputs))
  saved = native.Saved(adapter, config, task_type="CAUSAL_LM", base_name=str(folder))
  own = tmp_path_factory.mktemp("own") / "adapter"
  native.write_adapter(own, saved)
  return folder, own, loaded, lora.apply(loaded.params, adapter, **inputs), saved


def test_peft_reads_the_same_deltas_as_one_lora(written, tmp_path):
  base, own, _, expected, saved = written
  _, _, notes = convert(str(base), str(own), str(tmp_path / "peft"), "peft")
  assert "zeros outside of their blocks" in notes[0]
  config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"]) == (4, 12)
  model = transformers.GPT2LMHeadModel.from_pretrained(base)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT asks by a name that transformers renames
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
  with torch.no_grad():
    got = model(torch.tensor(IDS)).logits.numpy()
  np.testing.assert_allclose(got, expected, atol=1e-4)
  assert fused.widened(saved).config.rank == 4


def test_loralib_gets_a_merged_linear_of_the_parts(written, tmp_path):
  base, own, loaded, expected, _ = written
  _, _, notes = convert(str(base), str(own), str(tmp_path / "lib"), "loralib")
  assert notes == [f"{tmp_path}/lib/lora.bin is for lora_alpha=6, not stored there"]
  tensors = torch.load(tmp_path / "lib/lora.bin", weights_only=True)
  assert {tuple(x.shape) for x in tensors.values()} == {(4, 6), (12, 2)}
  adapter, _ = loralib.read_adapter(
    tmp_path / "lib/lora.bin",
    loaded.params,
    loaded.keymap,
    alpha=6,
    enable_lora=[True, False, True],
  )
  params = lx.merge(loaded.params, adapter)
  got = loaded.module.apply({"params": params}, IDS, np.ones_like(IDS))
  np.testing.assert_allclose(got, expected, atol=1e-4)
