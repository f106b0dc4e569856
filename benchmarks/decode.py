"""Generated tokens a second, and the time to the first one, against transformers.

  python -m benchmarks.decode
  python -m benchmarks.decode --batch=16

SmolLM2's shape with random weights, and rank-16 LoRA on all linear layers: folders
that PEFT writes and both sides read. transformers' `generate` on PEFT's model, with the
adapter unmerged, runs beside ours, unmerged and merged; all greedy, 128 tokens after
64. The sides take turns in one process, and ratios are taken round by round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

import lorax_flax as lx
from benchmarks import common
from lorax_flax.models import with_adapter
from lorax_flax.serve import generate as generation
from lorax_flax.serve.settings import Decoding

PROMPT = 64
# Number of new tokens -> the new ids of each row.
Write = Callable[[int], list[list[int]]]


def _theirs(base: Path, adapter: Path) -> Any:
  """PEFT's model, written into two folders: random, the factors b too."""
  torch.manual_seed(0)
  fields = common.decoder_config(common.SMOLLM2)
  # Texts have no end: each has all its tokens.
  ends = {"eos_token_id": None, "bos_token_id": None}
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, **ends))
  model.generation_config = transformers.GenerationConfig()
  model.save_pretrained(base)
  config = peft.LoraConfig(
    r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
  )
  adapted = peft.get_peft_model(model, config).eval()
  with torch.no_grad():
    for name, parameter in adapted.named_parameters():
      if "lora_B" in name:
        parameter.normal_(std=0.02)
  adapted.save_pretrained(adapter)
  return adapted


def _write_theirs(model: Any, prompts_BxT: np.ndarray) -> Write:
  ids = torch.tensor(prompts_BxT)

  def write(new: int) -> list[list[int]]:
    with torch.inference_mode():
      found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
      )
    return found[:, PROMPT:].tolist()

  return write


def _write_ours(writer: generation.Writer, prompts_BxT: np.ndarray) -> Write:
  prompts = prompts_BxT.tolist()

  def write(new: int) -> list[list[int]]:
    decoding = Decoding(max_new_tokens=new)
    found = generation.generate(writer, prompts, decoding, batch_size=len(prompts))
    each = dict(found)
    return [list(each[number].ids) for number in range(len(prompts))]

  return write


def _sides(folder: Path, batch: int) -> dict[str, Write]:
  base, adapter = folder / "base", folder / "adapter"
  model = _theirs(base, adapter)
  loaded, saved = with_adapter.load(str(base), adapter)
  rng = np.random.default_rng(0)
  prompts_BxT = rng.integers(3, common.SMOLLM2.vocab, (batch, PROMPT))
  merged = vars(loaded) | {"params": lx.merge(loaded.params, saved.adapter)}
  return {
    "transformers, PEFT": _write_theirs(model, prompts_BxT),
    "lorax_flax": _write_ours(generation.writer(loaded, saved.adapter), prompts_BxT),
    "lorax_flax, merged": _write_ours(
      generation.writer(type(loaded)(**merged)), prompts_BxT
    ),
  }


def _seconds(write: Write, new: int) -> float:
  start = time.perf_counter()
  write(new)
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--new", type=int, default=128, help="tokens after each prompt")
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    sides = _sides(Path(folder), args.batch)
    first = {name: write(args.new) for name, write in sides.items()}
    for write in sides.values():
      write(1)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
      for name, write in sides.items():
        turns[name].append((_seconds(write, 1), _seconds(write, args.new)))
  theirs = next(iter(sides))
  rows = []
  for name, found in turns.items():
    rates = [args.batch * args.new / seconds for _, seconds in found]
    pairs = zip(turns[theirs], found, strict=True)
    ratios = [other / own for (_, other), (_, own) in pairs]
    same = np.mean(np.array(first[name]) == np.array(first[theirs]))
    rows.append(
      (
        name,
        f"{statistics.median(rates):.1f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f}-{max(ratios):.2f}",
        f"{statistics.median(seconds for seconds, _ in found):.2f}",
        f"{same:.0%}",
      )
    )
  header = ("side", "tokens/s", "ratio", "range", "first token, s", "same tokens")
  title = f"{common.SMOLLM2}\nbatch {args.batch}, {PROMPT} + {args.new} tokens, float32"
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()
