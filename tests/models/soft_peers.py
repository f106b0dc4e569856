"""Tiny models of transformers with PEFT's prefixes and prompts, and ours of both."""

import peft
import torch
import transformers

from lorax_flax.models.soft import SoftSettings
from tests.models import family

LENGTH = 4
MODELS = {
  "llama": (
    transformers.LlamaForCausalLM,
    transformers.LlamaConfig,
    {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
  ),
  "mistral": (
    transformers.MistralForCausalLM,
    transformers.MistralConfig,
    {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6},
  ),
  "gpt2": (
    transformers.GPT2LMHeadModel,
    transformers.GPT2Config,
    {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48},
  ),
}
KINDS = {
  "prefix": (peft.PrefixTuningConfig, {}),
  "prompt": (peft.PromptTuningConfig, {}),
}


def save(name, folder, **fields):
  """Saves a random model; returns it."""
  kind, config, own = MODELS[name]
  usual = {"vocab_size": 37, "initializer_range": 0.3, "bos_token_id": 1}
  usual |= {"pad_token_id": 0, "eos_token_id": 2}
  torch.manual_seed(0)
  return family.save(folder, kind(config(**{**usual, **own, **fields})))


def wrapped(model, method, task="CAUSAL_LM", **fields):
  """The model in PEFT's, with a random prefix or prompt."""
  kind, own = KINDS[method]
  config = kind(task_type=task, num_virtual_tokens=LENGTH, **own, **fields)
  return peft.get_peft_model(model, config).eval()


def settings(method):
  return SoftSettings(method=method, length=LENGTH)
