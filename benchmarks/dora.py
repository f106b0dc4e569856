"""A training step with DoRA over the same step with LoRA: time, FLOPs, memory traffic.

  python -m benchmarks.dora [--layers=8] [--rounds=7]

Layers of SmolLM2's shape, all linear layers adapted; the norms of the changed kernels
are a part of the step. The two take turns in one process; the ratio is taken round by
round. FLOPs and bytes are the compiler's.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax

from benchmarks import common

SIDES = {"LoRA": "all_linear", "DoRA": "dora"}


def _turns(made: dict[str, tuple[Any, Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each side's steps, the first left out."""
  states = {name: job.state for name, (job, _) in made.items()}
  seconds: dict[str, list[float]] = {name: [] for name in made}
  for _ in range(rounds + 1):
    for name, (job, compiled) in made.items():
      start = time.perf_counter()
      states[name], metrics = compiled(states[name], job.base, job.batch)
      jax.block_until_ready((states[name], metrics))
      seconds[name].append(time.perf_counter() - start)
  return {name: found[1:] for name, found in seconds.items()}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  shape = dataclasses.replace(common.SMOLLM2, layers=args.layers)
  jobs = {name: common.job(shape, method) for name, method in SIDES.items()}
  made = {name: (job, job.compile()) for name, job in jobs.items()}
  turns = _turns(made, args.rounds)
  rows = []
  for name, (_, compiled) in made.items():
    costs = compiled.cost_analysis()
    seconds = statistics.median(turns[name])
    figures = (costs["flops"] / 1e9, costs["bytes accessed"] / 1e9, seconds)
    rows.append((name, *(f"{x:.3f}" for x in figures)))
  ratios = [d / lora for lora, d in zip(*turns.values(), strict=True)]
  title = f"{shape.layers} layers, {shape.batch} x {shape.length} tokens"
  print(common.table(title, ("", "GFLOP", "GB", "s a step"), rows))
  spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
  print(f"DoRA over LoRA, time: {statistics.median(ratios):.2f} ({spread})")
  print(common.repeat())


if __name__ == "__main__":
  main()
