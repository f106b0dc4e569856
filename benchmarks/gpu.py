"""Training and decoding on one GPU in bfloat16, against PEFT and transformers.

  python -m benchmarks.gpu
  python -m benchmarks.gpu --only=1b-2k --out=figures.jsonl

Llamas of 1B's and 8B's shapes with random weights, so that nothing is downloaded; LoRA
of rank 16 on all linear layers, AdamW. Each side runs alone, in a process of its own,
in each of its ways (gradient checkpointing or not; our layers scanned or not), and its
fastest that fits counts. transformers attends by torch's sdpa and trains under
autocast; QLoRA's peer is bitsandbytes, where it is installed. Besides JAX, Flax, optax
and orbax, a checkout of this project needs gguf here, and the peers torch, transformers
and peft.

MFU is the step's needed FLOPs by the card's peak: two products with each frozen kernel
(three where it is trained), six FLOPs for each number of a factor, and the causal half
of attention; what is computed twice counts once.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Shape
from benchmarks.gpu_case import NEW, PROMPT, Case

SIDES = ("lorax_flax", "peft")
# FLOP/s of dense bfloat16 products, by what a card's name begins with.
PEAKS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}


def _shape(shape: Shape, batch: int, length: int = 2048) -> Shape:
  return dataclasses.replace(shape, batch=batch, length=length)


_SHORT, _LONG = _shape(common.LLAMA_1B, 4), _shape(common.LLAMA_1B, 1, 8192)
_SHORT_8B, _LONG_8B = _shape(common.LLAMA_8B, 4), _shape(common.LLAMA_8B, 1, 8192)
ROWS: dict[str, Case] = {
  "1b-2k lora": Case("", "train", _SHORT, "lora"),
  "1b-2k lora, 8 texts a row": Case("", "train", _SHORT, "lora", segments=8),
  "1b-2k qlora": Case("", "train", _SHORT, "qlora"),
  "1b-2k full": Case("", "train", _SHORT, "full"),
  "1b-8k lora": Case("", "train", _LONG, "lora"),
  "1b-8k lora, 8 texts a row": Case("", "train", _LONG, "lora", segments=8),
  "1b-8k qlora": Case("", "train", _LONG, "qlora"),
  "8b-2k lora": Case("", "train", _SHORT_8B, "lora"),
  "8b-2k qlora": Case("", "train", _SHORT_8B, "qlora"),
  "8b-8k lora": Case("", "train", _LONG_8B, "lora"),
  "8b-8k qlora": Case("", "train", _LONG_8B, "qlora"),
  "1b decode, batch 1": Case("", "decode", _shape(_SHORT, 1), "lora"),
  "1b decode, batch 16": Case("", "decode", _shape(_SHORT, 16), "lora"),
}
# Ways to train, by side: whether layers are scanned, and what is recomputed.
WAYS = {
  "lorax_flax": [(False, "none"), (True, "none"), (True, "inputs"), (True, "full")],
  "peft": [(False, "none"), (False, "full")],
}


def ways(case: Case, side: str) -> list[Case]:
  """The cases of a row's side."""
  made = WAYS[side] if case.task == "train" else [(False, "none")]
  return [
    dataclasses.replace(case, side=side, scan=scan, remat=remat) for scan, remat in made
  ]


def needed_flops(case: Case) -> float:
  """FLOPs that a training step needs."""
  s = case.shape
  kv = s.hidden * (s.kv_heads or s.heads) // s.heads
  sides = [(s.hidden, s.hidden), (s.hidden, kv), (s.hidden, kv), (s.hidden, s.hidden)]
  sides += [(s.hidden, s.mlp), (s.hidden, s.mlp), (s.mlp, s.hidden)]
  kernels = s.layers * sum(a * b for a, b in sides) + s.hidden * s.vocab
  factors = s.layers * s.rank * sum(a + b for a, b in sides)
  each = 6 * kernels if case.method == "full" else 4 * kernels + 6 * factors
  # Forward two products, backward four, of which causality leaves half.
  attended = s.length / case.segments
  each += 6 * s.layers * attended * s.hidden
  return s.batch * s.length * each


def tokens(case: Case) -> int:
  return case.shape.batch * (case.shape.length if case.task == "train" else NEW)


def run(case: Case, timeout: int) -> dict[str, Any]:
  """The figures of a case, or the last words of what ended it."""
  spec = json.dumps(dataclasses.asdict(case))
  command = [sys.executable, "-m", "benchmarks.gpu_side", spec]
  try:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
  except subprocess.TimeoutExpired:
    return {"error": f"more than {timeout} s"}
  if ended.returncode == 0:
    return json.loads(ended.stdout.splitlines()[-1])
  lost = "out of memory" in ended.stderr.lower() or "RESOURCE_EXHAUSTED" in ended.stderr
  lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
  return {"error": "out of memory" if lost else lines[-1][:300]}


def _row(name: str, case: Case, best: dict[str, tuple[Case, dict]]) -> list[str]:
  """A row of the table: of both sides, what each did best."""
  cells = [name]
  for side in SIDES:
    if side not in best:
      cells += ["-"] * 4
      continue
    way, figures = best[side]
    peak = next((p for n, p in PEAKS.items() if figures["card"].startswith(n)), None)
    is_train = case.task == "train"
    mfu = needed_flops(case) / figures["seconds"] / peak if is_train and peak else None
    cells += [
      f"{tokens(case) / figures['seconds']:,.0f}",
      f"{figures['bytes'] / 2**30:.1f}" if is_train else "-",
      f"{mfu:.0%}" if mfu is not None else "-",
      f"{'scan' if way.scan else 'loop'}/{way.remat}"
      if side == SIDES[0]
      else way.remat,
    ]
  ratio = "-"
  if len(best) == len(SIDES):
    ours, theirs = (best[side][1]["seconds"] for side in SIDES)
    ratio = f"{theirs / ours:.2f}"
  return [*cells, ratio]


def _recorded(file: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
  """Figures by row and way, of a file that an earlier run has written."""
  if file is None or not file.exists():
    return {}
  lines = map(json.loads, file.read_text().splitlines())
  return {(line.pop("row"), line.pop("way")): line for line in lines}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--only", default="", help="a pattern of rows' names")
  add("--ways", default="", help="a pattern of SIDE/loop/REMAT and SIDE/scan/REMAT")
  add("--steps", type=int, default=5)
  add("--timeout", type=int, default=300, help="seconds of a process")
  add("--out", type=Path, help="a file of figures; what is in it is not run again")
  args = parser.parse_args()
  found = _recorded(args.out)
  rows, cards = [], set()
  for name, case in ROWS.items():
    if not re.search(args.only, name):
      continue
    case = dataclasses.replace(case, steps=args.steps)
    best: dict[str, tuple[Case, dict]] = {}
    for way in (way for side in SIDES for way in ways(case, side)):
      label = f"{way.side}/{'scan' if way.scan else 'loop'}/{way.remat}"
      if not re.search(args.ways, label):
        continue
      if (name, label) not in found:
        found[name, label] = run(way, args.timeout)
        line = json.dumps({"row": name, "way": label, **found[name, label]})
        print(line, file=sys.stderr, flush=True)
        if args.out:
          with args.out.open("a") as file:
            file.write(f"{line}\n")
      figures = found[name, label]
      if "error" in figures:
        continue
      cards.add(f"{figures['card']}, {figures['versions']}")
      if way.side not in best or figures["seconds"] < best[way.side][1]["seconds"]:
        best[way.side] = way, figures
    rows.append(_row(name, case, best))
  header = ["shape, method"]
  header += [
    f"{n}{side}" for side in ("", ", PEFT") for n in ("tokens/s", "GiB", "MFU", "way")
  ]
  title = f"{'; '.join(sorted(cards))}\ndecoding: {PROMPT} + {NEW} tokens"
  print(common.table(title, [*header, "ratio"], rows))
  print(common.repeat())


if __name__ == "__main__":
  main()
