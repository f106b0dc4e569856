"""RoBERTa with loralib's layers in its attention, as LoRA's authors train it."""

import loralib
import torch
import transformers

# RoBERTa-base in every size that a file of its adapter knows; the rest is small.
_SIZES = {"vocab_size": 30, "intermediate_size": 32, "max_position_embeddings": 24}


def base():
  """A random classifier of three labels, without adapters."""
  config = transformers.RobertaConfig(
    **_SIZES, type_vocab_size=1, num_labels=3, pad_token_id=1, initializer_range=0.05
  )
  return transformers.RobertaForSequenceClassification(config)


def adapt(model):
  """Puts a loralib.Linear in the place of every query and value, and returns model."""
  for layer in model.roberta.encoder.layer:
    attention = layer.attention.self
    for name in ("query", "value"):
      old = getattr(attention, name)
      new = loralib.Linear(768, 768, r=8, lora_alpha=16, merge_weights=False)
      new.weight, new.bias = old.weight, old.bias
      setattr(attention, name, new)
  return model


def write(path):
  """Saves random adapters and a random head as the authors' script does."""
  torch.manual_seed(0)
  model = adapt(base())
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_B" in name:
        parameter.copy_(0.05 * torch.randn_like(parameter))
  state = loralib.lora_state_dict(model)
  head = {k: v for k, v in model.state_dict().items() if k.startswith("classifier")}
  torch.save(state | head, path)
  return path
