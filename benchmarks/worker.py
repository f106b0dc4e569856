"""One side of the throughput benchmark: steps on request, over standard streams.

Reads lines "N" and answers each with the seconds that N steps took, after one that isn't
timed; on end of input says its peak memory. Run by benchmarks/throughput.py.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

STARTED = time.time()


def ours(spec: dict) -> Callable[[], None]:
  """A step of lorax_flax; it returns when the step is done."""
  import jax

  from benchmarks import common

  job = common.job(common.Shape(**spec["shape"]), spec["method"], dtype=spec["dtype"])
  state = job.state
  # Compiled once and called as that, so that no call traces again.
  compiled = job.compile()

  def step():
    nonlocal state
    state, metrics = compiled(state, job.base, job.batch)
    jax.block_until_ready(metrics)

  return step


def peft(spec: dict) -> Callable[[], None]:
  """The same step of PEFT on torch."""
  import contextlib

  import torch
  import transformers
  from peft import LoraConfig, get_peft_model

  shape = spec["shape"]
  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count() or 1)
  config = transformers.RobertaConfig(
    vocab_size=shape["vocab"],
    hidden_size=shape["hidden"],
    num_hidden_layers=shape["layers"],
    num_attention_heads=shape["heads"],
    intermediate_size=shape["mlp"],
    max_position_embeddings=max(514, shape["length"] + 2),
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    hidden_dropout_prob=shape["dropout"],
    attention_probs_dropout_prob=shape["dropout"],
  )
  targets = {"query_value": ["query", "value"], "all_linear": "all-linear"}
  model = get_peft_model(
    transformers.RobertaForSequenceClassification(config),
    LoraConfig(
      r=shape["rank"],
      lora_alpha=16,
      target_modules=targets[spec["method"]],
      task_type="SEQ_CLS",
    ),
  ).train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
  ids_BxT = torch.randint(4, shape["vocab"], (shape["batch"], shape["length"]))
  inputs = {
    "input_ids": ids_BxT,
    "attention_mask": torch.ones_like(ids_BxT),
    "labels": torch.arange(shape["batch"]) % 2,
  }
  half = spec["dtype"] == "bfloat16"

  def step():
    scope = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    with scope:
      loss = model(**inputs).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    loss.item()

  return step


def main() -> None:
  spec = json.loads(sys.argv[1])
  step = {"lorax_flax": ours, "peft": peft}[spec["side"]](spec)
  step()
  answer({"first_step": time.time() - STARTED})
  for line in sys.stdin:
    step()  # after a pause the first is slower: a virtual machine gives idle memory back
    start = time.perf_counter()
    for _ in range(int(line)):
      step()
    answer({"seconds": time.perf_counter() - start})
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  answer({"peak_mb": peak * 1024 / 1e6})


def answer(value: dict) -> None:
  print(json.dumps(value), flush=True)


if __name__ == "__main__":
  main()
