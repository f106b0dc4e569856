"""A LoraConfig from PEFT's config and back, by way of the model that knows both."""

import json

import jax
import peft
import pytest

import lorax_flax as lx
from lorax_flax.models import registry
from tests.models import decoders


@pytest.mark.parametrize("scan", [False, True])
def test_a_config_goes_to_paths_and_back(tmp_path, scan):
  decoders.Peer("Llama").save(tmp_path / "base")
  their = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=3,
    lora_alpha=5,
    target_modules=["q_proj", "down_proj"],
    rank_pattern={"layers.1.mlp.down_proj": 2},
  )
  their.save_pretrained(tmp_path / "theirs")
  loaded = registry.load(tmp_path / "base", scan=scan)
  config = lx.LoraConfig.from_peft(tmp_path / "theirs", loaded)
  inputs = decoders.BATCH
  apply_fn = lambda params, inputs: loaded.module.apply({"params": params}, **inputs)
  adapter = lx.adapt(apply_fn, config).init(jax.random.key(0), loaded.params, inputs)
  layer = "layers" if scan else "layer_0"
  assert {p for p in adapter if p.startswith(f"model/{layer}/")} == {
    f"model/{layer}/self_attn/q_proj/kernel",
    f"model/{layer}/mlp/down_proj/kernel",
  }
  back = config.to_peft(adapter, loaded)
  json.dumps(back)
  assert (back["r"], back["lora_alpha"], back["task_type"]) == (3, 5, "CAUSAL_LM")
  again = lx.LoraConfig.from_peft(back, loaded)
  assert again == config


def test_a_module_that_the_model_lacks_is_named(tmp_path):
  decoders.Peer("Llama").save(tmp_path)
  loaded = registry.load(tmp_path)
  raw = {"peft_type": "LORA", "target_modules": ["q_prj"]}
  with pytest.raises(lx.LoraxError, match="did you mean 'q_proj'"):
    lx.LoraConfig.from_peft(raw, loaded)
