"""A tiny random model of transformers for each family, and its inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 37
_DECODER = {
  "vocab_size": VOCAB,
  "hidden_size": 24,
  "intermediate_size": 20,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 23,
  "initializer_range": 0.3,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
_ENCODER = {
  "vocab_size": VOCAB,
  "hidden_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "intermediate_size": 20,
  "max_position_embeddings": 23,
  "initializer_range": 0.3,
}
_T5 = {
  "vocab_size": VOCAB,
  "d_model": 12,
  "d_kv": 5,
  "d_ff": 20,
  "num_layers": 3,
  "num_heads": 3,
  "decoder_start_token_id": 0,
}
_STD = 0.3  # of T5's weights, whose config gives no initializer_range


@dataclass(frozen=True)
class Peer:
  """A family's model.

  Attributes:
    config, model: names of transformers' classes.
    fields: fields of the config.
    lora: PEFT's targets, as arguments of its LoraConfig.
    task_type: PEFT's task type.
    feed: "text", "text pair" of an encoder and a decoder, or "pixels".
    pad: the padding token's id.
  """

  config: str
  model: str
  fields: Mapping[str, Any]
  lora: Mapping[str, Any]
  task_type: str | None
  feed: str = "text"
  pad: int = 0

  def save(self, folder: Path) -> Any:
    """Makes the model and writes it to a folder; every weight is random."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, self.config)(**self.fields)
    model = getattr(transformers, self.model)(config)
    if not self.fields.get("tie_word_embeddings", True):
      # transformers ties T5's all the same while it makes a model.
      model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    std = _STD if self.feed == "text pair" else 0.1
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.ndim == 1 or self.feed == "text pair":
          parameter.add_(std * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model

  def load(self, folder: Path) -> Any:
    import transformers

    return getattr(transformers, self.model).from_pretrained(folder)

  def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of three: texts without padding, padded right, and padded left."""
    rng = np.random.default_rng(seed)
    if self.feed == "pixels":
      return {"pixel_values": rng.normal(size=(3, 3, 10, 10)).astype(np.float32)}
    length, rows = 11, np.ones((3, 11), np.int32)
    rows[1, 7:] = 0
    if self.task_type != "SEQ_CLS":  # there the first token must be a real one
      rows[2, :4] = 0
    ids = np.where(rows, rng.integers(4, VOCAB, rows.shape), self.pad)
    found = {"input_ids": ids.astype(np.int32), "attention_mask": rows}
    if self.feed == "text pair":
      decoded = rng.integers(4, VOCAB, (3, length - 4))
      found["decoder_input_ids"] = decoded.astype(np.int32)
    return found

  def real(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mask of the logits that are not of padding, over all axes but the last."""
    if self.task_type in ("SEQ_CLS", None):
      return np.ones(3, bool)
    if self.feed == "text pair":
      return np.ones(inputs["decoder_input_ids"].shape, bool)
    return inputs["attention_mask"] == 1

  def labels(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """A class for each of the real logits, int32."""
    classes = self.fields.get("num_labels", VOCAB)
    count = int(self.real(inputs).sum())
    return (np.arange(count, dtype=np.int32) * 7 + 2) % classes

  @staticmethod
  def tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The batch as torch tensors, with int64 ids."""
    import torch

    found = {name: torch.tensor(x) for name, x in inputs.items()}
    return {n: x if x.is_floating_point() else x.long() for n, x in found.items()}


_LINEAR = {"target_modules": "all-linear"}


def _encoder(name: str, targets, pad: int = 0, **fields) -> Peer:
  fields = {**_ENCODER, "num_labels": 3, "pad_token_id": pad, **fields}
  model = f"{name}ForSequenceClassification"
  return Peer(f"{name}Config", model, fields, targets, "SEQ_CLS", pad=pad)


def _decoder(name: str, targets=_LINEAR, config: str | None = None, **fields) -> Peer:
  fields = {**_DECODER, **fields}
  config = f"{config or name}Config"
  return Peer(config, f"{name}ForCausalLM", fields, targets, "CAUSAL_LM")


_WINDOW = {"sliding_window": 5}
_GEMMA = {"head_dim": 6, "query_pre_attn_scalar": 5, **_WINDOW}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _t5(**fields) -> Peer:
  fields, model = {**_T5, **fields}, "T5ForConditionalGeneration"
  return Peer("T5Config", model, fields, _LINEAR, "SEQ_2_SEQ_LM", "text pair")


PEERS: dict[str, Peer] = {
  "bert": _encoder("Bert", _LINEAR),
  "roberta": _encoder(
    "Roberta", {"target_modules": ["query", "value"]}, 1, type_vocab_size=1
  ),
  "distilbert": _encoder("DistilBert", {"target_modules": ["q_lin", "v_lin", "lin1"]}),
  "deberta-v2": _encoder(
    "DebertaV2",
    {"target_modules": ["query_proj", "value_proj"]},
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    position_buckets=4,
    norm_rel_ebd="layer_norm",
    conv_kernel_size=3,
    type_vocab_size=0,
  ),
  "gpt2": Peer(
    "GPT2Config",
    "GPT2LMHeadModel",
    {
      "vocab_size": VOCAB,
      "n_embd": 12,
      "n_layer": 3,
      "n_head": 3,
      "n_positions": 23,
      "initializer_range": 0.3,
      "bos_token_id": 1,
      "eos_token_id": 2,
    },
    {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "CAUSAL_LM",
  ),
  "llama": _decoder("Llama"),
  "mistral": _decoder("Mistral", **_WINDOW),
  "qwen2": _decoder("Qwen2"),
  "qwen3": _decoder("Qwen3", head_dim=6),
  "smollm3": _decoder("SmolLM3"),
  "gemma": _decoder("Gemma", head_dim=6),
  "gemma2": _decoder("Gemma2", **_GEMMA),
  "gemma3_text": _decoder("Gemma3", config="Gemma3Text", **_GEMMA),
  "phi3": _decoder("Phi3"),
  "mixtral": _decoder(
    "Mixtral",
    {"target_modules": ["q_proj", "v_proj"]},
    num_local_experts=4,
    num_experts_per_tok=2,
  ),
  "qwen3_moe": _decoder(
    "Qwen3Moe",
    {"target_modules": ["q_proj", "v_proj"]},
    head_dim=6,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
  ),
  "t5": _t5(),
  "t5 v1.1": _t5(**_GATED),
  "vit": Peer(
    "ViTConfig",
    "ViTForImageClassification",
    {
      "hidden_size": 12,
      "num_hidden_layers": 3,
      "num_attention_heads": 3,
      "intermediate_size": 20,
      "image_size": 10,
      "patch_size": 3,
      "initializer_range": 0.3,
      "num_labels": 3,
    },
    {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    None,
    "pixels",
  ),
}
