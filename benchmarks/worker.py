"""One side of the throughput benchmark: steps on request, over standard streams.

Reads lines "N", and answers each with the seconds of N steps, after one that isn't
timed, and with the FLOP/s of a matrix product. At the end of its input it answers with
its peak memory. Run by benchmarks/throughput.py.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

STARTED = time.time()


Call = Callable[[], None]


def ours(spec: dict) -> tuple[Call, Call]:
  """A step of lorax_flax, and a matrix product; each returns when it is done."""
  import jax
  import jax.numpy as jnp

  from benchmarks import common

  job = common.job(common.Shape(**spec["shape"]), spec["method"], dtype=spec["dtype"])
  state = job.state
  # Compiled once and called as that, so that no call traces again.
  compiled = job.compile()

  def step():
    nonlocal state
    state, metrics = compiled(state, job.base, job.batch)
    jax.block_until_ready(metrics)

  multiply = jax.jit(jnp.matmul)
  x, w = (jnp.ones(sizes, spec["dtype"]) for sizes in product_sizes(spec["shape"]))
  return step, lambda: multiply(x, w).block_until_ready()


def _encoder(shape: dict) -> tuple[Any, Any]:
  """transformers' model, and the labels of a batch."""
  import torch
  import transformers

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
  model = transformers.RobertaForSequenceClassification(config)
  return model, lambda ids_BxT: torch.arange(len(ids_BxT)) % 2


def _decoder(shape: dict) -> tuple[Any, Any]:
  """transformers' model, and the labels of a batch."""
  import transformers

  from benchmarks import common

  fields = common.decoder_config(common.Shape(**shape))
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
  return model, lambda ids_BxT: ids_BxT


# By the shape's model: what makes it, its task, and its targets.
PEFT = {
  "llama": (_decoder, "CAUSAL_LM", ["q_proj", "v_proj"]),
  "roberta": (_encoder, "SEQ_CLS", ["query", "value"]),
}


def peft(spec: dict) -> tuple[Call, Call]:
  """A step of PEFT on torch, and a matrix product, of the same sizes."""
  import contextlib

  import torch
  from peft import LoraConfig, get_peft_model

  shape = spec["shape"]
  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count() or 1)
  make, task_type, few = PEFT[shape["model"]]
  base, labels = make(shape)
  targets = {"query_value": few, "all_linear": "all-linear"}[spec["method"]]
  config = LoraConfig(
    r=shape["rank"], lora_alpha=16, target_modules=targets, task_type=task_type
  )
  model = get_peft_model(base, config).train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
  ids_BxT = torch.randint(4, shape["vocab"], (shape["batch"], shape["length"]))
  inputs = {
    "input_ids": ids_BxT,
    "attention_mask": torch.ones_like(ids_BxT),
    "labels": labels(ids_BxT),
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

  dtype = getattr(torch, spec["dtype"])
  x, w = (torch.ones(sizes, dtype=dtype) for sizes in product_sizes(shape))
  return step, lambda: x @ w


def product_sizes(shape: dict) -> tuple[tuple[int, int], tuple[int, int]]:
  """Sizes of the step's largest product: a batch's tokens, and the MLP's kernel."""
  return (shape["batch"] * shape["length"], shape["hidden"]), (
    shape["hidden"],
    shape["mlp"],
  )


def flops_a_second(multiply: Call, shape: dict, times: int = 10) -> float:
  """The highest FLOP/s of some products."""
  (rows, inner), (_, columns) = product_sizes(shape)
  seconds = []
  for _ in range(times):
    start = time.perf_counter()
    multiply()
    seconds.append(time.perf_counter() - start)
  return 2 * rows * inner * columns / min(seconds)


def main() -> None:
  spec = json.loads(sys.argv[1])
  step, multiply = {"lorax_flax": ours, "peft": peft}[spec["side"]](spec)
  step()
  answer({"first_step": time.time() - STARTED})
  for line in sys.stdin:
    # After a pause the first is slower: a virtual machine gives idle memory back.
    step()
    start = time.perf_counter()
    for _ in range(int(line)):
      step()
    seconds = time.perf_counter() - start
    rate = flops_a_second(multiply, spec["shape"])
    answer({"seconds": seconds, "flops_a_second": rate})
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  answer({"peak_mb": peak * 1024 / 1e6})


def answer(value: dict) -> None:
  print(json.dumps(value), flush=True)


if __name__ == "__main__":
  main()
