"""Tiny random models of transformers, saved as folders, and what they compute."""

import numpy as np
import torch
import transformers

SIZES = {
  "vocab_size": 37,
  "hidden_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "intermediate_size": 20,
  "initializer_range": 0.3,
}


def save(folder, family="bert", *, seed=0, max_shard_size="5GB", **kwargs):
  """Saves a random sequence classifier; returns it, in evaluation mode."""
  torch.manual_seed(seed)
  config_type, model_type = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (
      transformers.RobertaConfig,
      transformers.RobertaForSequenceClassification,
    ),
  }[family]
  extra = {"max_position_embeddings": 23}
  if family == "roberta":
    extra |= {"pad_token_id": 1, "type_vocab_size": 1}
  model = model_type(config_type(**{**SIZES, **extra, **kwargs})).eval()
  with torch.no_grad():  # norms and biases that would show if they were lost
    for p in model.parameters():
      if p.ndim == 1:
        p.add_(0.1 * torch.randn_like(p))
  model.save_pretrained(folder, max_shard_size=max_shard_size)
  return model


def batch(family="bert", *, seed=0, rows=3, length=11, vocab=37):
  """Padded rows of token ids with their masks and token types, as numpy."""
  rng = np.random.default_rng(seed)
  pad = 0 if family == "bert" else 1
  ids = rng.integers(4, vocab, (rows, length)).astype(np.int32)
  mask = np.ones_like(ids)
  for i in range(1, rows):
    mask[i, length - 2 * i :] = 0
  ids = np.where(mask == 1, ids, pad).astype(np.int32)
  types = np.zeros_like(ids)
  if family == "bert":
    types[:, length // 2 :] = mask[:, length // 2 :]
  return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def logits(model, inputs):
  with torch.no_grad():
    tensors = {k: torch.tensor(v).long() for k, v in inputs.items()}
    return model(**tensors).logits.numpy()
