"""LoRA on rows of your own: python examples/own_data.py [FILE.csv]

The file has the columns `text` and `label`. The encoder's weights are random, so that
nothing is downloaded: `lorax_flax.models.registry.load(FOLDER)` reads a checkpoint.
"""

import csv
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax

import lorax_flax as lx
from lorax_flax.models.bert.config import EncoderConfig
from lorax_flax.models.bert.model import SequenceClassifier

path = sys.argv[1] if sys.argv[1:] else Path(__file__).with_name("reviews.csv")
rows = list(csv.DictReader(Path(path).read_text().splitlines()))
names = sorted({row["label"] for row in rows})
vocab = sorted({word for row in rows for word in row["text"].split()})
ids_BxT = np.zeros((len(rows), max(len(r["text"].split()) for r in rows)), np.int32)
for i, row in enumerate(rows):  # 0 is padding
  tokens = [1 + vocab.index(word) for word in row["text"].split()]
  ids_BxT[i, : len(tokens)] = tokens
batch = {"input_ids": ids_BxT, "attention_mask": np.int32(ids_BxT > 0)}
labels_B = np.array([names.index(row["label"]) for row in rows])

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes |= {"intermediate_size": 64, "vocab_size": 1 + len(vocab), "pad_token_id": 0}
model = SequenceClassifier(EncoderConfig("bert", num_labels=len(names), **sizes))
params = nn.meta.unbox(model.init(jax.random.key(0), **batch)["params"])

config = lx.LoraConfig(targets=["query", "value"], rank=8, tuned="classifier")
lora = lx.adapt(lambda params, batch: model.apply({"params": params}, **batch), config)


def loss(logits_BxC, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch[-1])


# A tuple's last entry is the label; those before it are the function's arguments.
train = {"steps": 120, "learning_rate": 5e-3, "schedule": "constant"}
fitted = lx.fit(lora, params, [(batch, labels_B)], loss, **train)
for line in fitted.history:
  print(f"step {line['step']}: loss {line['train/loss']:.4f}")
