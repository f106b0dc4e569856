"""A tiny random llama with a tokenizer of its own, that writes."""

import json

from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.models import registry
from lorax_flax.serve import generate as generation
from tests.data.test_tokenizers import FAMILIES
from tests.serve.conftest import save

VOCAB = 600


def tokenizer(folder):
  model_type, class_name, write = FAMILIES["gpt2"]
  write(folder)
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": class_name, "model_type": model_type})
  )
  return load_tokenizer(folder)


def make(folder, window=None, *, scan=False):
  """A llama, or with a sliding window a mistral of the same weights."""
  save("llama", folder, vocab_size=VOCAB, eos_token_id=None)
  own = tokenizer(folder)
  if window is not None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"sliding_window": window}
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    file.write_text(json.dumps(config))
  return generation.writer(registry.load(folder, scan=scan), tokenizer=own)
