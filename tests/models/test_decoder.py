"""Llama and its relatives against transformers."""

import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.models import registry
from tests.models import family
from tests.models.decoders import (
  BATCH,
  Peer,
  batch,
  check_equals_peer,
  real,
  rows_alone,
)

LLAMA = Peer("Llama", {"head_dim": 6})
PEERS = {
  "llama": LLAMA,
  "llama tied, one key head, biases": Peer(
    "Llama",
    {
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "tie_word_embeddings": True,
      "attention_bias": True,
      "mlp_bias": True,
    },
  ),
  "mistral": Peer("Mistral", {"sliding_window": 4}),
  "mistral without a window": Peer("Mistral", {"sliding_window": None}),
  "qwen2": Peer(
    "Qwen2",
    {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
  ),
  "qwen3": Peer(
    "Qwen3",
    {
      "head_dim": 10,
      "attention_bias": True,
      "use_sliding_window": True,
      "sliding_window": 5,
      "layer_types": ["sliding_attention", "full_attention"],
    },
  ),
  "gemma": Peer("Gemma", {"head_dim": 6, "hidden_act": "gelu"}),
  "gemma2": Peer(
    "Gemma2",
    {
      "head_dim": 6,
      "query_pre_attn_scalar": 3,
      "sliding_window": 4,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 3.0,
    },
  ),
  "gemma2 without caps": Peer(
    "Gemma2",
    {
      "head_dim": 6,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "attention_bias": True,
    },
  ),
  "gemma3": Peer(
    "Gemma3",
    {
      "head_dim": 6,
      "query_pre_attn_scalar": 3,
      "sliding_window": 4,
      "sliding_window_pattern": 2,
      "final_logit_softcapping": 5.0,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
      },
    },
  ),
  "phi3": Peer(
    "Phi3",
    {
      "sliding_window": 6,
      "num_attention_heads": 4,
      "rope_parameters": {
        "rope_type": "longrope",
        "partial_rotary_factor": 0.7,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
      },
      "original_max_position_embeddings": 9,
    },
  ),
  "smollm3": Peer(
    "SmolLM3",
    {
      "no_rope_layers": [1, 0],
      "use_sliding_window": True,
      "sliding_window": 3,
      "mlp_bias": True,
    },
  ),
  "qwen2 without a window": Peer("Qwen2", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_transformers_scanned_or_not(tmp_path, name):
  left = check_equals_peer(tmp_path, PEERS[name].save(tmp_path))
  assert set(left.values()) <= {"norm", "embedding"}, left


def test_positions_may_be_given(tmp_path):
  rope = {"rope_type": "dynamic", "factor": 2.0}
  model = LLAMA.save(tmp_path, rope_parameters=rope)
  inputs = batch(26, -9)
  places = np.cumsum(inputs["attention_mask"], axis=1) - 1
  # Not from 0 on: the text's length, which this scaling looks at, is then another.
  inputs["position_ids"] = np.maximum(places + 7, 0).astype(np.int32)
  family.check_logits(tmp_path, model, [inputs], real=real, peer=rows_alone)


_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("phi3", {}),
    ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 9}),
    ("smollm3", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 9}),
  ],
)
def test_a_rows_logits_are_those_of_the_row_alone(tmp_path, name, changes):
  """Whatever stands beside it: short rows beside long ones, and padding."""
  model = PEERS[name].save(tmp_path, **changes)
  lengths = batch(24, 5, -5, 9, -9, 10, -10)
  family.check_logits(tmp_path, model, [lengths], real=real, peer=rows_alone)


@pytest.mark.parametrize(
  ("name", "scan"),
  [
    ("llama tied, one key head, biases", False),
    ("qwen2", True),
    ("phi3", False),
    ("gemma3", True),
  ],
)
def test_a_checkpoint_comes_back_as_it_was_read(tmp_path, name, scan):
  model = PEERS[name].save(tmp_path / "base")
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=scan)


@pytest.mark.parametrize(("name", "remat"), [("llama", "inputs"), ("gemma2", "full")])
def test_gradients_equal_torch_with_scan_and_remat(tmp_path, name, remat):
  model = PEERS[name].save(tmp_path)
  options = {"scan": True, "remat": remat, "real": real}
  family.check_gradients(tmp_path, model, BATCH, **options)


LINEAR = (
  *(f"self_attn/{name}_proj" for name in "qkvo"),
  *(f"mlp/{name}_proj" for name in ("gate", "up", "down")),
)


def test_lora_on_every_linear_layer_less_the_head(tmp_path):
  PEERS["qwen2"].save(tmp_path)
  loaded = registry.load(tmp_path, scan=True)
  want = [f"model/layers/{name}/kernel" for name in LINEAR]
  family.check_lora(loaded, batch(7, 5), want)


def test_lora_on_a_fused_projection_is_one_pair_of_factors(tmp_path):
  PEERS["phi3"].save(tmp_path, num_hidden_layers=1)
  loaded = registry.load(tmp_path)
  names = ("self_attn/qkv", "self_attn/o", "mlp/gate_up", "mlp/down")
  want = [f"model/layer_0/{name}_proj/kernel" for name in names]
  family.check_lora(loaded, batch(7, 5), want)


def test_lora_on_a_tied_embedding_is_one_pair_of_factors(tmp_path):
  PEERS["qwen2 without a window"].save(tmp_path, num_hidden_layers=1)
  loaded = registry.load(tmp_path)
  table = "model/embed_tokens/embedding"
  family.check_lora(loaded, batch(7, 5), [table], targets=[table])


OLD_CONFIGS = {
  # Each as its publisher wrote it: (peer, fields now, the same as they were).
  "llama 3.1": (
    "Llama",
    {
      "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      }
    },
    {
      "rope_parameters": ...,
      "rope_theta": 5e5,
      "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
      },
    },
  ),
  "gemma2": ("Gemma2", {}, {"layer_types": ..., "hidden_act": "gelu"}),
  "gemma3": (
    "Gemma3",
    {
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
      },
      "num_hidden_layers": 3,
      "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    {
      "rope_parameters": ...,
      "layer_types": ...,
      "rope_theta": 9e5,
      "rope_local_base_freq": 7e3,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      "sliding_window_pattern": 3,
    },
  ),
  "phi3": (
    "Phi3",
    {
      "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
      }
    },
    {
      "rope_parameters": ...,
      "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
      },
    },
  ),
}


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_a_config_in_its_old_form_reads_as_the_new_one(tmp_path, name):
  peer, fields, old = OLD_CONFIGS[name]
  Peer(peer, fields).save(tmp_path)
  hf_config = registry.read_config(tmp_path)
  family.change_config(tmp_path, **old)
  was = registry.read_config(tmp_path)
  assert was != hf_config
  one, other = (registry.of(c).configure(c) for c in (hf_config, was))
  assert one == other
  assert one != registry.of(was).configure({"model_type": was["model_type"]})


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of"),
    ({"head_dim": 5}, "head_dim must be even, not 5"),
    ({"hidden_act": "sillu"}, "did you mean 'silu'"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers must be from 1 to 1000"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
    ({"rope_parameters": {"rope_type": "yarm"}}, "did you mean 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
    ({"rope_parameters": {"factr": 2.0}}, "did you mean 'factor'"),
    ({"rope_scaling": {"factor": "2"}}, "factor must be a positive number"),
    ({"rope_scaling": [2]}, "rope_parameters must be an object"),
  ],
)
def test_a_config_that_we_cannot_honour_is_an_error(tmp_path, fields, message):
  LLAMA.save(tmp_path)
  family.change_config(tmp_path, **fields)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"layer_types": ["full_attention"]}, "1 layer_types of 2 layers"),
    ({"layer_types": ["local"] * 2}, "layer_types must be a list of"),
    ({"use_sliding_window": False}, "without a sliding_window"),
    ({"sliding_window": 0}, "sliding_window must be a positive integer"),
    ({"use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
  ],
)
def test_windows_that_do_not_fit_are_an_error(tmp_path, fields, message):
  PEERS["qwen2"].save(tmp_path)
  family.change_config(tmp_path, **fields)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


def test_bfloat16_is_close(tmp_path):
  model = LLAMA.save(tmp_path, initializer_range=0.05)
  got = family.logits(registry.load(tmp_path, dtype="bfloat16"), batch(9))
  np.testing.assert_allclose(got, family.torch_logits(model, batch(9)), atol=0.05)
