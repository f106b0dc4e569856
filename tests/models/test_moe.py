"""Mixtures of experts against transformers."""

import jax
import numpy as np
import pytest
import safetensors.numpy

import lorax_flax as lx
from lorax_flax.models import registry
from tests.models import family
from tests.models.decoders import BATCH, Peer, batch, check_equals_peer, real

PEERS = {
  "mixtral": Peer(
    "Mixtral",
    {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5},
  ),
  "qwen3_moe": Peer(
    "Qwen3Moe",
    {
      "num_experts": 4,
      "num_experts_per_tok": 3,
      "moe_intermediate_size": 12,
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "head_dim": 6,
      "norm_topk_prob": False,
      "mlp_only_layers": [],
    },
  ),
  "qwen3_moe, normed": Peer(
    "Qwen3Moe",
    {
      "num_experts": 4,
      "num_experts_per_tok": 2,
      "norm_topk_prob": True,
      "attention_bias": True,
      "tie_word_embeddings": True,
      "use_sliding_window": True,
      "sliding_window": 3,
    },
  ),
}


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_transformers_scanned_or_not(tmp_path, name):
  left = check_equals_peer(tmp_path, PEERS[name].save(tmp_path))
  assert set(left.values()) <= {"norm", "raw"}, left
  assert "model.layers.0.mlp.gate" in left


def stored_keys(folder):
  return set(safetensors.numpy.load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
  ("name", "key", "scan"),
  [
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight", True),
    ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight", False),
  ],
)
def test_experts_are_read_in_one_tensor_or_apart(tmp_path, name, key, scan):
  model = PEERS[name].save(tmp_path / "base")
  assert key in stored_keys(tmp_path / "base")
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=scan)
  assert "model.layers.1.mlp.experts.gate_up_proj" in stored_keys(tmp_path / "out")
  one, other = (registry.load(tmp_path / n, scan=scan) for n in ("base", "out"))
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_gradients_equal_torch_with_scan_and_remat(tmp_path):
  model = PEERS["mixtral"].save(tmp_path)
  options = {"scan": True, "remat": "full", "real": real}
  family.check_gradients(tmp_path, model, BATCH, **options)


def test_lora_has_a_pair_of_factors_for_each_expert(tmp_path):
  PEERS["mixtral"].save(tmp_path, num_hidden_layers=1)
  loaded = registry.load(tmp_path, scan=True)
  layer = "model/layers"
  want = [f"{layer}/self_attn/{name}_proj/kernel" for name in "qkvo"]
  experts = [f"{layer}/mlp/experts/{name}_proj" for name in ("gate_up", "down")]
  family.check_lora(loaded, batch(7, 5), [*want, *experts, f"{layer}/mlp/gate/weight"])

  def apply_fn(params, inputs):
    return loaded.module.apply({"params": params}, **inputs)

  adapter = lx.adapt(apply_fn, lx.LoraConfig(rank=2, targets=experts)).init(
    jax.random.key(0), loaded.params, batch(3)
  )
  for path in experts:
    assert adapter[path].roles == ("stack", "stack", "in", "out")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 of num_experts 5"),
    ({"num_local_experts": 0}, "num_experts must be a positive integer"),
    ({"num_experts": 7}, "two values of one field"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers"),
    ({"output_router_logits": True}, "output_router_logits"),
  ],
)
def test_a_config_that_we_cannot_honour_is_an_error(tmp_path, fields, message):
  PEERS["mixtral"].save(tmp_path)
  family.change_config(tmp_path, **fields)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


def test_a_lost_expert_is_an_error(tmp_path):
  PEERS["mixtral"].save(tmp_path)
  path = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  with pytest.raises(lx.LoraxError, match=r"lacks 1 keys: .*experts\.3\.w3\.weight"):
    registry.load(tmp_path)
