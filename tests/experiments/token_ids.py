"""Rows of token ids that can be learnt, and real configs shrunk to train on them."""

import json

import numpy as np

from experiments.cli import config_dict, config_flag

STEPS, BATCH, RATE, CLIP, DECAY, SMOOTHING = 8, 4, 0.02, 0.5, 0.1, 0.1
VOCAB, LONGEST = 24, 16


def rows(count, seed, longest=LONGEST):
  """Sequences that count up in threes; the first tokens of some are not learnt."""
  rng = np.random.default_rng(seed)
  for number in range(count):
    length = int(rng.integers(5, longest + 1))
    ids = (int(rng.integers(0, VOCAB)) + 3 * np.arange(length)) % VOCAB
    row = {"input_ids": ids.tolist()}
    if number % 3:
      row["loss_mask"] = [0] * (length - 3) + [1, 0, 1]
    yield row


def write(folder, train, held_out):
  folder.mkdir(parents=True, exist_ok=True)
  for name, lines in (("train", train), ("validation", held_out)):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text)
  return folder


def shrunk(spec, base, data, **changes):
  config = config_flag.load(spec)
  # Answers take time to compile, and have tests of their own.
  task = changes.get("data.task", config.data.task)
  silent = {"data.prompts": 0} if task == "next_token" else {}
  values = {
    **silent,
    "model.path": str(base),
    "model.hf_config": {},
    "model.dtype": "float32",
    "data.path": data and str(data),
    "data.max_length": LONGEST,
    "data.buckets": 1,
    "lora.rank": 3,
    "train.epochs": None,
    "train.steps": STEPS,
    "train.warmup_steps": None,
    "train.warmup_fraction": None,
    "train.batch_size": BATCH,
    "train.eval_batch_size": BATCH,
    "train.learning_rate": RATE,
    "train.grad_clip": CLIP,
    "train.weight_decay": DECAY,
    "train.label_smoothing": SMOOTHING,
    "train.log_steps": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
  }
  return changed(config, values | changes)


def changed(config, values):
  """The settings of a config with these fields, by dotted name."""
  with config.unlocked():
    for name, value in values.items():
      section, _, field = name.rpartition(".")
      (config[section] if section else config)[field] = value
  return config_dict.convert(config)
