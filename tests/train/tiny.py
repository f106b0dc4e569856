"""A run of the real command that is as small as can be: checkpoint, data and config.

Written with our own tools alone, so that the processes of a test start quickly.
"""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
import tokenizers

from lorax_flax.hub.checkpoints import export
from lorax_flax.models import registry

ROOT = Path(__file__).parents[2]
WORDS = (
  "[PAD] [CLS] [SEP] [UNK] a man plan canal panama was it cat i saw no lemon melon"
)
# Divisible by eight where the rules cut; the types and the positions are not cut.
BERT = {
  "model_type": "bert",
  "vocab_size": 32,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 8,
  "intermediate_size": 64,
  "max_position_embeddings": 11,
  "type_vocab_size": 2,
  "pad_token_id": 0,
  "hidden_dropout_prob": 0.1,
  "attention_probs_dropout_prob": 0.1,
}
# Two heads of queries for each of keys and values.
LLAMA = {
  "model_type": "llama",
  "vocab_size": 32,
  "hidden_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 16,
  "num_key_value_heads": 8,
  "head_dim": 4,
  "intermediate_size": 64,
  "max_position_embeddings": 16,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
}
# Each token sees few others, and most of these are another device's.
WINDOWED = LLAMA | {
  "model_type": "mistral",
  "num_hidden_layers": 2,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "sliding_window": 5,
}
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": 32,
  "n_positions": 16,
  "n_embd": 32,
  "n_layer": 1,
  "n_head": 8,
}
MIXTRAL = LLAMA | {
  "model_type": "mixtral",
  "num_local_experts": 4,
  "num_experts_per_tok": 2,
}


def model(folder: Path, config: dict, seed: int = 0) -> None:
  """A random checkpoint without its head, and a word-level tokenizer."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  family = registry.of(config)
  shape = family.configure(config)
  shapes = family.shapes(family.build(shape, np.dtype("float32"), False, "none"))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes
  )
  tensors = export.to_tensors(params, family.keymap(shape, False))
  body = {k: v for k, v in tensors.items() if not k.startswith("classifier")}
  safetensors.numpy.save_file(body, folder / "model.safetensors")
  vocab = {word: i for i, word in enumerate(WORDS.split())}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  said = {"tokenizer_class": "PreTrainedTokenizerFast"}  # A BERT's is a WordPiece.
  (folder / "tokenizer_config.json").write_text(json.dumps(said))


def glue(folder: Path, train: int = 32, held_out: int = 21) -> None:
  """SST-2's files: whether a text names cats and men. 21 is no multiple of anything."""
  rng = np.random.default_rng(1)
  words = WORDS.split()[4:]
  for name, count in (("train.tsv", train), ("dev.tsv", held_out)):
    rows = ["sentence\tlabel"]
    for _ in range(count):
      text = [words[i] for i in rng.integers(0, len(words), 6)]
      rows.append(f"{' '.join(text)}\t{int('cat' in text or 'man' in text)}")
    file = folder / "SST-2" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n")


def token_ids(folder: Path, vocab: int, train: int = 32, held_out: int = 21) -> None:
  """Files of rows of token ids, of 3 to 8 each."""
  rng = np.random.default_rng(1)
  for name, count in (("train", train), ("validation", held_out)):
    rows = [rng.integers(0, vocab, rng.integers(3, 9)).tolist() for _ in range(count)]
    text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)


_CONFIG = """
from experiments.configs import common


def get_config():
  config = common.base()
  config.model.path = {model!r}
  config.data.task = "sst2"
  config.data.glue_dir = {glue!r}
  config.data.max_length = 8
  config.data.buckets = 1
  config.lora.rank = 2
  config.lora.dropout = 0.1
  config.train.steps = 12
  config.train.batch_size = 8
  config.train.eval_batch_size = 8
  config.train.learning_rate = 0.02
  config.train.log_steps = 2
  config.train.save_steps = 3
  return config
"""


def write(folder: Path, **fields) -> Path:
  """All of it; returns the config. `fields` are of the model's config.json."""
  model(folder / "model", BERT | fields)
  glue(folder / "glue")
  text = _CONFIG.format(model=str(folder / "model"), glue=str(folder / "glue"))
  (folder / "config.py").write_text(text)
  return folder / "config.py"
