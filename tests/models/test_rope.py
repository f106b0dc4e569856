"""Rotary positions against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lorax_flax.models import ops
from lorax_flax.models.llama import hf_rope

KINDS = {
  "default": {},
  "linear": {"factor": 3.0},
  "dynamic": {"factor": 2.0},
  "yarn": {
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
  },
  "yarn as in DeepSeek": {
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "truncate": False,
  },
  "llama3": {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
  },
  "longrope": {
    "short_factor": [1.0, 1.5, 2.0, 2.0, 2.0],
    "long_factor": [2.0, 3.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 64,
  },
}


def theirs(layer, config, positions):
  x = torch.zeros(1)
  cos, sin = layer(config)(x, torch.tensor(np.asarray(positions)))
  return cos.numpy(), sin.numpy()


def check(rope, head_size, want, positions):
  lengths = jnp.max(positions, axis=1, keepdims=True) + 1
  got = ops.rotations(rope, head_size, positions, lengths, jnp.float32)
  for ours, their in zip(got, want, strict=True):
    both = np.concatenate([ours, ours], axis=-1)[:, :, 0]
    np.testing.assert_allclose(both, their, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, 64, 65, 300])
def test_every_scaling_equals_transformers(kind, length):
  rope = {"rope_type": kind.split()[0], "rope_theta": 500.0, **KINDS[kind]}
  fields = {"head_dim": 10, "max_position_embeddings": 128}
  config = transformers.LlamaConfig(**fields, rope_parameters=rope)
  read = hf_rope.read(
    rope, config.to_dict(), max_position_embeddings=128, theta=10000.0
  )
  positions = jnp.arange(length, dtype=jnp.int32)[None, :]
  want = theirs(LlamaRotaryEmbedding, config, positions)
  check(read, 10, want, positions)


def test_a_scaling_changes_the_angles():
  positions = jnp.arange(300, dtype=jnp.int32)[None, :]
  found = []
  for kind, rope in KINDS.items():
    read = hf_rope.read(
      {"rope_type": kind.split()[0], **rope},
      {},
      max_position_embeddings=128,
      theta=500.0,
    )
    lengths = jnp.asarray([[300]], jnp.int32)
    found.append(np.asarray(ops.rotations(read, 10, positions, lengths, jnp.float32)))
  for i, one in enumerate(found):
    for other in found[:i]:
      assert np.abs(one - other).max() > 0.01


def test_a_part_of_the_features_may_turn():
  rope = {"partial_rotary_factor": 0.7}
  config = transformers.Phi3Config(
    hidden_size=30, num_attention_heads=3, rope_parameters=rope
  )
  read = hf_rope.read(rope, {}, max_position_embeddings=4096, theta=10000.0)
  positions = jnp.asarray([[0, 3, 9]], jnp.int32)
  want = theirs(Phi3RotaryEmbedding, config, positions)
  check(read, 10, want, positions)
  x = jnp.ones((1, 3, 2, 10))
  lengths = jnp.asarray([[10]], jnp.int32)
  turned = ops.rotate(x, ops.rotations(read, 10, positions, lengths, jnp.float32))
  np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
  assert (turned[:, 1:, :, :8] != 1.0).all()


def test_the_old_form_of_a_config_reads_as_the_new_one():
  old = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_theta": 77.0,
    "rope_parameters": None,
  }
  new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}}
  options = {"max_position_embeddings": 9, "theta": 10000.0}
  one, other = (hf_rope.read(hf_rope.given(c), c, **options) for c in (old, new))
  assert one == other == ops.Rope("linear", 77.0, 1, 9, factor=2.0)
