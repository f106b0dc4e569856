"""One side of the GPU benchmark: a case in JSON -> its figures in JSON, on a line.

Run by benchmarks/gpu.py, a process for each case: JAX and torch both take the memory.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from benchmarks import common
from benchmarks.common import Shape

# Of the decoding: tokens of each prompt, and tokens after it.
PROMPT, NEW = 512, 128

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
  """What a side computes.

  Attributes:
    side: "lorax_flax" or "peft".
    task: "train" or "decode".
    method: "lora", "qlora" or "full".
    segments: number of texts that are packed into a row.
    scan: whether our layers are scanned.
    remat: what is recomputed: ours, or any but "none" for gradient checkpointing.
  """

  side: str
  task: str
  shape: Shape
  method: str
  segments: int = 1
  scan: bool = False
  remat: str = "none"
  steps: int = 5

  @classmethod
  def of(cls, fields: Mapping[str, Any]) -> Self:
    return cls(**{**fields, "shape": Shape(**fields["shape"])})

  def segments_T(self) -> np.ndarray:
    """The number of each token's text in its row, from 1 on."""
    return np.arange(self.shape.length) * self.segments // self.shape.length + 1


def _median(call: Call, steps: int) -> float:
  """Median seconds of a call that returns when its work is done."""
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def ours(case: Case) -> Mapping[str, Any]:
  import jax

  return {"train": _train_ours, "decode": _decode_ours}[case.task](case) | {
    "versions": f"JAX {jax.__version__}",
    "card": jax.devices()[0].device_kind,
  }


def _train_ours(case: Case) -> dict[str, Any]:
  import jax

  method = "full" if case.method == "full" else "all_linear"
  job = common.job(
    case.shape,
    method,
    dtype="bfloat16",
    scan=case.scan,
    remat=case.remat,
    quant="nf4" if case.method == "qlora" else None,
  )
  packed_BxT = np.tile(case.segments_T().astype(np.int32), (case.shape.batch, 1))
  job = replace(job, batch={**job.batch, "attention_mask": jax.device_put(packed_BxT)})
  start = time.perf_counter()
  compiled = job.compile()
  compilation = time.perf_counter() - start
  memory, state = compiled.memory_analysis(), job.state
  losses = []

  def step():
    nonlocal state
    state, metrics = compiled(state, job.base, job.batch)
    losses.append(jax.block_until_ready(metrics))

  step()
  _median(step, 2)
  seconds = _median(step, case.steps)
  peak = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
  return {
    "seconds": seconds,
    "bytes": peak,
    "compilation": compilation,
    "loss": losses[-1]["loss"].value(),
  }


def _decode_ours(case: Case) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  import lorax_flax as lx
  from lorax_flax.models import registry
  from lorax_flax.serve import decoder, generate
  from lorax_flax.serve.ends import Ends
  from lorax_flax.serve.settings import Decoding

  shape = case.shape
  model = registry.outline(common.decoder_config(shape), dtype="bfloat16")
  ids_BxT = np.random.default_rng(0).integers(3, shape.vocab, (shape.batch, PROMPT))
  inputs = decoder.prompts(ids_BxT[:, :4].tolist(), 16)
  lora = lx.adapt(
    decoder.forward_of(model), lx.LoraConfig("all-linear", rank=shape.rank)
  )

  cache = model.blank_cache(len(ids_BxT), 16)
  shapes = common.shapes_of(model.module, "bfloat16", inputs["input_ids"])
  adapter = jax.eval_shape(
    lambda params: lora.init(jax.random.key(1), params, **inputs, cache=cache), shapes
  )
  adapter = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), adapter)
  both = decoder.decoder_of(model, decoder.adapted(model))
  writer = generate.Writer(model, both, common.drawn((shapes, adapter)), Ends())
  decoding = Decoding(max_new_tokens=NEW)

  def write():
    list(generate.generate(writer, ids_BxT.tolist(), decoding, batch_size=shape.batch))

  write()
  return {"seconds": _median(write, case.steps), "bytes": 0}


def peft(case: Case) -> Mapping[str, Any]:
  import torch
  import transformers
  from peft import LoraConfig, get_peft_model

  torch.manual_seed(0)
  torch.set_default_dtype(torch.bfloat16)
  config = transformers.LlamaConfig(
    **common.decoder_config(case.shape),
    # Texts have no end: each has all its tokens.
    eos_token_id=None,
    bos_token_id=None,
    attn_implementation="sdpa",
    use_cache=case.task == "decode",
  )
  with torch.device("cuda"):
    model = transformers.LlamaForCausalLM(config)
  if case.method == "qlora":
    _quantise(model)
  if case.method != "full":
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(
      r=case.shape.rank,
      lora_alpha=16,
      target_modules="all-linear",
      task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)  # its factors are float32
    if case.task == "decode":
      model = model.to(torch.bfloat16)
  if case.remat != "none":
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
  figures = {"train": _train_peft, "decode": _decode_peft}[case.task](case, model)
  return figures | {
    "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    "card": torch.cuda.get_device_name(),
  }


def _quantise(model: Any) -> None:
  """Puts bitsandbytes' layers in the place of the body's linear ones."""
  import bitsandbytes as bnb
  import torch

  for module in list(model.model.layers.modules()):
    for name, linear in list(module.named_children()):
      if type(linear) is not torch.nn.Linear:
        continue
      made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
      )
      made.weight = bnb.nn.Params4bit(
        linear.weight.data.cpu(),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
      )
      setattr(module, name, made.cuda())
  model.is_loaded_in_4bit = True


def _train_peft(case: Case, model: Any) -> dict[str, Any]:
  import torch

  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
  shape = case.shape
  ids = torch.randint(4, shape.vocab, (shape.batch, shape.length), device="cuda")
  own = case.segments_T()
  places = np.arange(len(own)) - np.searchsorted(own, own)
  inputs = {}
  if case.segments > 1:  # By its places transformers sees where a text begins.
    inputs["position_ids"] = torch.tensor(places, device="cuda").expand(ids.shape)
  losses = []

  def step():
    with torch.autocast("cuda", torch.bfloat16):
      loss = model(input_ids=ids, labels=ids, **inputs).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    losses.append(loss.item())
    torch.cuda.synchronize()

  step()
  _median(step, 2)
  torch.cuda.reset_peak_memory_stats()
  seconds = _median(step, case.steps)
  peak = torch.cuda.max_memory_allocated()
  return {"seconds": seconds, "bytes": peak, "loss": losses[-1]}


def _decode_peft(case: Case, model: Any) -> dict[str, Any]:
  import torch
  import transformers

  model.eval()
  model.generation_config = transformers.GenerationConfig()
  ids = torch.randint(3, case.shape.vocab, (case.shape.batch, PROMPT), device="cuda")

  def write():
    with torch.inference_mode():
      model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
      )
    torch.cuda.synchronize()

  write()
  return {"seconds": _median(write, case.steps), "bytes": 0}


def main() -> None:
  case = Case.of(json.loads(sys.argv[1]))
  start = time.perf_counter()
  figures = dict({"lorax_flax": ours, "peft": peft}[case.side](case))
  figures["wall"] = time.perf_counter() - start
  print(json.dumps(figures), flush=True)


if __name__ == "__main__":
  main()
