"""Three steps of AdamW on PEFT's adapters, in torch and here, from the same start.

Each family with another form of adapter: every kind of module and method trains.
"""

import dataclasses
import warnings

import pytest

from benchmarks import parity
from benchmarks.peers import PEERS
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry
from tests.hub.peft import peers

# The base, PEFT's config, and whether layers are scanned here.
CASES = {
  "roberta": ("roberta", {"target_modules": "all-linear"}, True),
  "gpt2": (
    "gpt2",
    {
      "target_modules": ["c_attn", "c_fc"],
      "fan_in_fan_out": True,
      "trainable_token_indices": [4, 9, 11],
      "layers_to_transform": [0, 2],
      "layers_pattern": "h",
    },
    True,
  ),
  "llama": (
    "llama",
    {
      "target_modules": "all-linear",
      "use_rslora": True,
      "alpha_pattern": {"o_proj": 3},
    },
    False,
  ),
  "llama, dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, True),
  "t5": ("t5", {"target_modules": ["q", "v", "wo"]}, False),
  "vit": (
    "vit",
    {
      "target_modules": ["projection", "v_proj"],
      "modules_to_save": ["classifier"],
      "bias": "lora_only",
      "lora_bias": True,
    },
    False,
  ),
  "mixtral": (
    "mixtral",
    {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    False,
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_pefts(case, tmp_path):
  name, config, scan = CASES[case]
  peer = dataclasses.replace(PEERS[name], lora=config)
  base = peer.save(tmp_path / "base")
  model = peers.adapted(base, task_type=peer.task_type, **config)
  peers.save(model, tmp_path / "start")
  loaded = registry.load(tmp_path / "base", scan=scan)
  adapter, config = hub_peft.read_adapter(
    tmp_path / "start", loaded.params, loaded.keymap
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's, about what it saves
    found = parity.training(peer, model, loaded, adapter, config, tmp_path)
  assert found["loss"] < 1e-3
  assert found["adapter"] < 1e-3
  assert any(p.grad is not None and p.grad.any() for p in model.parameters())
