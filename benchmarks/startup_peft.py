"""The quick start's first step by a script on PEFT; see benchmarks.startup.

  python benchmarks/startup_peft.py MODEL_FOLDER TEXTS.json

All texts are tokenised, as our command does; LoRA of rank 8 on all linear layers.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
  folder, texts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
  tokenizer = AutoTokenizer.from_pretrained(folder)
  rows = tokenizer([row["text"] for row in texts], truncation=True, max_length=32)
  model = AutoModelForSequenceClassification.from_pretrained(folder)
  config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules="all-linear")
  model = get_peft_model(model, config).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
  first = {name: values[:32] for name, values in rows.items()}
  batch = tokenizer.pad(first, return_tensors="pt")
  labels = torch.tensor([row["label"] for row in texts[:32]])
  loss = model(**batch, labels=labels).loss
  loss.backward()
  optimizer.step()
  print(f"step 1/1 loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
  main()
