"""Tiny random language models with few likely tokens, so that texts end early."""

import pytest
import torch
import transformers

from lorax_flax.models import registry
from tests.serve.models import Recomputed

VOCAB = 40
_CONFIGS = {
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
}


@pytest.fixture(scope="module", params=_CONFIGS)
def pair(request, tmp_path_factory):
  """A model of transformers, and ours that recomputes its texts."""
  config, kind, fields = _CONFIGS[request.param]
  torch.manual_seed(1)
  model = kind(
    config(
      vocab_size=VOCAB,
      initializer_range=0.2,
      pad_token_id=0,
      bos_token_id=1,
      eos_token_id=2,
      **fields,
    )
  ).eval()
  folder = tmp_path_factory.mktemp("model")
  model.save_pretrained(folder)
  model.generation_config.eos_token_id = None  # The tests give it.
  return model, Recomputed(registry.load(folder))
