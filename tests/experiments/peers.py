"""Tiny checkpoints and adapters that transformers and peft write, for the commands."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

WORDS = "<s> <pad> </s> <unk> a man a plan canal panama was it cat i saw no lemon melon"
NAMES = ("bad", "so-so", "good")
ROOT = Path(__file__).parents[2]


_ENCODER = {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 22,
}
_TEXT = {"vocab_size": 24, "pad_token_id": 1}
# Of each family: transformers' names of the config and of the model, and sizes.
FAMILIES = {
  "bert": (
    "BertConfig",
    "BertForSequenceClassification",
    _ENCODER | _TEXT | {"type_vocab_size": 2},
  ),
  "roberta": (
    "RobertaConfig",
    "RobertaForSequenceClassification",
    _ENCODER | _TEXT | {"type_vocab_size": 1},
  ),
  "distilbert": (
    "DistilBertConfig",
    "DistilBertForSequenceClassification",
    _TEXT
    | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    | {"max_position_embeddings": 22},
  ),
  "deberta-v2": (
    "DebertaV2Config",
    "DebertaV2ForSequenceClassification",
    _ENCODER
    | _TEXT
    | {"type_vocab_size": 0, "relative_attention": True, "position_buckets": 4}
    | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "pooler_hidden_size": 16},
  ),
  "gpt2": (
    "GPT2Config",
    "GPT2LMHeadModel",
    _TEXT | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 22},
  ),
  "llama": (
    "LlamaConfig",
    "LlamaForCausalLM",
    _ENCODER | _TEXT | {"num_key_value_heads": 1, "tie_word_embeddings": False},
  ),
  "t5": (
    "T5Config",
    "T5ForConditionalGeneration",
    {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 24}
    | {"num_layers": 2, "num_heads": 2, "n_positions": 22},
  ),
  "vit": (
    "ViTConfig",
    "ViTForImageClassification",
    {name: n for name, n in _ENCODER.items() if name != "max_position_embeddings"}
    | {"image_size": 8, "patch_size": 4},
  ),
}
# What PEFT is told of each family, where it is not as of BERT.
ADAPTERS = {
  "deberta-v2": {"target_modules": ["query_proj", "dense"]},
  "distilbert": {"target_modules": ["q_lin", "lin1"]},
  "gpt2": {
    "task_type": "CAUSAL_LM",
    "target_modules": ["c_attn", "c_fc"],
    "fan_in_fan_out": True,
  },
  "llama": {
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["lm_head"],
  },
  "t5": {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wo"]},
  "vit": {
    "task_type": None,
    "target_modules": ["q_proj", "fc1"],
    "modules_to_save": ["classifier"],
  },
}


def tiny(family, folder, *, num_labels=3, head=True, names=None):
  """Saves a random model and a word-level tokenizer; returns the torch model."""
  torch.manual_seed(0)
  config_name, name, sizes = FAMILIES[family]
  sizes = sizes | {"initializer_range": 0.3}
  sizes |= {"id2label": dict(enumerate(names))} if names else {"num_labels": num_labels}
  config = getattr(transformers, config_name)(**sizes)
  if not head:
    name = name.replace("ForSequenceClassification", "Model")
  model = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn_like(parameter) * 0.1)  # biases start as zeros
  model.save_pretrained(folder)
  if family != "vit":
    _tokenizer(family).save_pretrained(folder)
  return model


def _tokenizer(family):
  vocab = {word: i for i, word in enumerate(dict.fromkeys(WORDS.split()))}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  second = 1 if family == "bert" else 0
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s>:0 $A:0 </s>:0",
    pair=f"<s>:0 $A:0 </s>:0 $B:{second} </s>:{second}",
    special_tokens=[("<s>", 0), ("</s>", 2)],
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    pad_token="<pad>",
    model_input_names=["input_ids", "attention_mask"]
    + ["token_type_ids"] * (family == "bert"),
  )


def adapt(model, folder, **options):
  """A random PEFT adapter of the model, its head included; returns the PEFT model."""
  torch.manual_seed(1)
  usual = {"task_type": "SEQ_CLS", "r": 3, "target_modules": ["query", "dense"]}
  usual |= ADAPTERS.get(model.config.model_type, {})
  config = peft.LoraConfig(**{**usual, **options})
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of theirs; no base on the hub
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
      for parameter in adapted.parameters():
        if parameter.requires_grad:
          parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder)
  return adapted.eval()


def logits(model, lines, tokenizer=None, max_length=None):
  """The peer's logits, line by line, of language models at all positions: nothing is
  padded."""
  rows = []
  for line in lines:
    inputs = line
    if "text" in line:
      inputs = tokenizer(
        line["text"],
        line.get("text_pair"),
        truncation=max_length is not None,
        max_length=max_length,
      )
      ids = line.get("decoder_input_ids")
      inputs = {**inputs} | ({} if ids is None else {"decoder_input_ids": ids})
    tensors = {name: torch.tensor([ids]) for name, ids in inputs.items()}
    with torch.no_grad():
      rows.append(model(**tensors).logits[0].numpy())
  return rows


def python(*args, stdin=None, **environment):
  """Python in a process of its own, in the project's folder."""
  return subprocess.run(
    [sys.executable, *args],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    stdin=stdin,
    capture_output=True,
    text=True,
    check=False,
  )
