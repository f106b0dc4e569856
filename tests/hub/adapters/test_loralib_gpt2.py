"""GPT-2 as LoRA's authors adapt it: query and value of the merged c_attn."""

import dataclasses

import loralib
import numpy as np
import pytest
import torch
import transformers

import lorax_flax as lx
from experiments.convert import convert
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.files import torch_file
from lorax_flax.models import registry
from tests.models import family
from tests.models.test_gpt2 import SIZES, batch, real

ENABLE = [True, False, True]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """A base's folder, loralib's file, and loralib's model."""
  folder = tmp_path_factory.mktemp("gpt2")
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))
  family.save(folder / "base", model)
  for block in model.transformer.h:
    old, width = block.attn.c_attn, SIZES["n_embd"]
    new = loralib.MergedLinear(
      width,
      3 * width,
      r=4,
      lora_alpha=32,
      enable_lora=ENABLE,
      fan_in_fan_out=True,
      merge_weights=False,
    )
    new.weight, new.bias = old.weight, old.bias
    with torch.no_grad():
      new.lora_A.normal_(std=0.3)
      new.lora_B.normal_(std=0.3)
    block.attn.c_attn = new
  # As the paper's own script saves it.
  state = {"model_state_dict": loralib.lora_state_dict(model)}
  torch.save(state, folder / "gpt2.pt")
  return folder / "base", folder / "gpt2.pt", model.eval()


@pytest.mark.parametrize("scan", [False, True])
def test_logits_equal_loralibs(scan, adapted):
  base, file, model = adapted
  loaded = registry.load(base, scan=scan)
  saved = adapters.read(
    file, loaded.params, loaded.keymap, alpha=32, enable_lora=ENABLE
  )
  inputs = batch()
  want = family.torch_logits(model, inputs)
  before = family.logits(loaded, inputs)
  loaded = dataclasses.replace(loaded, params=lx.merge(loaded.params, saved.adapter))
  got = family.logits(loaded, inputs)
  picked = real(inputs)
  np.testing.assert_allclose(got[picked], want[picked], atol=1e-4)
  assert np.abs(want - before)[picked].max() > 0.1


def test_there_and_back_by_peft_is_the_same_file(adapted, tmp_path):
  base, file, _ = adapted
  given = {"alpha": 32, "enable_lora": ENABLE}
  convert(str(base), str(file), str(tmp_path / "peft"), "peft", **given)
  convert(
    str(base),
    str(tmp_path / "peft"),
    str(tmp_path / "x"),
    "loralib",
    enable_lora=ENABLE,
  )
  want, got = torch_file.read(file), torch_file.read(tmp_path / "x/lora.bin")
  assert want.keys() == got.keys()
  for key, tensor in want.items():
    np.testing.assert_array_equal(got[key], tensor, err_msg=key)
