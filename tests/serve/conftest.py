"""Tiny random language models with few likely tokens, so that texts end early."""

import pytest
import torch
import transformers

from lorax_flax.models import registry
from tests.serve.models import Recomputed

VOCAB = 40
CONFIGS = {
  "llama": (
    transformers.LlamaConfig,
    transformers.LlamaForCausalLM,
    {
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
    },
  ),
  "gpt2": (
    transformers.GPT2Config,
    transformers.GPT2LMHeadModel,
    {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
  ),
  "t5": (
    transformers.T5Config,
    transformers.T5ForConditionalGeneration,
    {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    | {"n_positions": 64, "decoder_start_token_id": 0, "initializer_factor": 4.0},
  ),
}


def save(name, folder, **fields):
  """Saves a random model of transformers; returns it."""
  config, kind, own = CONFIGS[name]
  ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
  usual = {"vocab_size": VOCAB, "initializer_range": 0.2, **ids}
  torch.manual_seed(1)
  model = kind(config(**{**usual, **own, **fields})).eval()
  model.save_pretrained(folder)
  return model


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def pair(request, tmp_path_factory):
  """A model of transformers without an end, and ours that recomputes its texts."""
  folder = tmp_path_factory.mktemp("model")
  model = save(request.param, folder)
  model.generation_config.eos_token_id = None  # The tests give it.
  return model, Recomputed(registry.load(folder))
