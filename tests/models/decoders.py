"""Tiny random decoders of transformers, and batches of padded texts."""

from dataclasses import dataclass, field

import numpy as np
import transformers

from tests.models import family

SIZES = {
  "vocab_size": 37,
  "hidden_size": 24,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 23,
  "initializer_range": 0.3,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}


@dataclass(frozen=True)
class Peer:
  """A model of transformers: its class's name less the ending, and its config."""

  name: str
  fields: dict = field(default_factory=dict)

  def save(self, folder, **fields):
    config = "Gemma3Text" if self.name == "Gemma3" else self.name
    config = getattr(transformers, f"{config}Config")
    model = getattr(transformers, f"{self.name}ForCausalLM")
    return family.save(folder, model(config(**{**SIZES, **self.fields, **fields})))


def batch(*lengths):
  """Token ids and masks; a row of each length, one of minus n is padded on the left."""
  total = max(map(abs, lengths))
  ids = np.random.default_rng(total).integers(3, 37, (len(lengths), total))
  mask = np.zeros((len(lengths), total), np.int32)
  for row, n in zip(mask, lengths, strict=True):
    row[:n] = 1
    if n < 0:
      row[:] = np.arange(total) >= total + n
  return {"input_ids": (ids * mask).astype(np.int32), "attention_mask": mask}


def real(inputs):
  return inputs["attention_mask"] == 1


def rows_alone(model, inputs):
  """The peer's logits of each row alone, without its padding; zeros for padding."""
  found = np.zeros((*inputs["input_ids"].shape, SIZES["vocab_size"]), np.float32)
  for row, places in enumerate(real(inputs)):
    alone = {name: x[row, places][None] for name, x in inputs.items()}
    found[row, places] = family.torch_logits(model, alone)[0]
  return found


BATCH = batch(13, 9, -7)


def check_equals_peer(folder, model):
  """Logits, keys and modules are the peer's, scanned or not.

  Returns:
    The key map's modules that are no linear layers and embeddings of torch: their
    kinds.
  """
  for scan in (False, True):
    loaded = family.check_logits(
      folder, model, [BATCH], real=real, peer=rows_alone, scan=scan
    )
  family.check_full_keys(loaded, model)
  return family.check_modules(loaded, model)
