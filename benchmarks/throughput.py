"""Tokens a second, peak memory and time to the first step, against PEFT on torch.

  python -m benchmarks.throughput
  python -m benchmarks.throughput --dtype=bfloat16
  python -m benchmarks.throughput --method=all_linear --dropout=0.1
  python -m benchmarks.throughput --model=smollm2 --method=all_linear

Two processes, one a side, take turns: a round is some steps of each, and the ratio is
taken round by round. The waiting process is stopped, so that its threads do not spin,
and starts its turn with a step that isn't timed. The time to the first step counts from
the start of the process, imports and compilation included; the two start one after the
other.

Both sides get huge pages for large arrays, as the training command does
(experiments/cli/large_pages.py), unless --pages=plain. The table also gives each side's
rate of a matrix product on this machine: if both reach the processor's peak, the two
steps, which compute the same products, cannot differ much.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import common

SIDES = ("lorax_flax", "peft")
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Worker:
  """A process of one side, stopped between its turns."""

  def __init__(self, spec: dict[str, Any], environment: dict[str, str]):
    # Settings for an old OpenBLAS slow a current numpy, and neither side needs them.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    self._process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.worker", json.dumps(spec)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      env=kept | environment,
    )
    self.first_step = self._answer()["first_step"]
    self._process.send_signal(signal.SIGSTOP)

  def steps(self, count: int) -> dict[str, float]:
    """Seconds of `count` steps, and the FLOP/s of a product after them."""
    assert self._process.stdin
    self._process.send_signal(signal.SIGCONT)
    self._process.stdin.write(f"{count}\n")
    self._process.stdin.flush()
    answer = self._answer()
    self._process.send_signal(signal.SIGSTOP)
    return answer

  def end(self) -> float:
    """Ends the process; returns its peak memory in MB."""
    assert self._process.stdin
    self._process.send_signal(signal.SIGCONT)
    self._process.stdin.close()
    peak = self._answer()["peak_mb"]
    self._process.wait()
    return peak

  def _answer(self) -> dict[str, float]:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError("a side ended early; run benchmarks.worker by hand to see why")
    return json.loads(line)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--method", default="query_value", choices=["query_value", "all_linear"]
  )
  parser.add_argument("--model", default="roberta-base", choices=sorted(common.SHAPES))
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--dropout", type=float, default=0.0)
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--steps", type=int, default=2, help="steps a round")
  parser.add_argument("--pages", default="large", choices=["large", "plain"])
  args = parser.parse_args()
  shape = dataclasses.replace(common.SHAPES[args.model], dropout=args.dropout)
  spec = {
    "shape": dataclasses.asdict(shape),
    "method": args.method,
    "dtype": args.dtype,
  }
  pages = LARGE_PAGES if args.pages == "large" else {}
  workers = {side: Worker(spec | {"side": side}, pages) for side in SIDES}
  for worker in workers.values():  # one round to warm up
    worker.steps(1)
  turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
  for _ in range(args.rounds):
    for side, worker in workers.items():
      turns[side].append(worker.steps(args.steps))
  seconds = {side: [turn["seconds"] for turn in turns[side]] for side in SIDES}
  peaks = {side: worker.end() for side, worker in workers.items()}

  tokens = shape.batch * shape.length * args.steps
  rows = []
  for side in SIDES:
    rates = [tokens / s for s in seconds[side]]
    rows.append(
      (
        side,
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{peaks[side]:,.0f}",
        f"{workers[side].first_step:.1f}",
        f"{max(turn['flops_a_second'] for turn in turns[side]) / 1e9:,.0f}",
      )
    )
  ratios = [b / a for a, b in zip(*(seconds[s] for s in SIDES), strict=True)]
  header = ("side", "tokens/s", "range", "peak MB", "first step, s", "matmul GFLOP/s")
  title = (
    f"{shape}\n{args.method}, {args.dtype}, {args.rounds} rounds, {args.pages} pages"
  )
  print(common.table(title, header, rows))
  ours, theirs = (workers[side].first_step for side in SIDES)
  print(
    f"lorax_flax over PEFT: throughput {statistics.median(ratios):.2f}"
    f" ({min(ratios):.2f} to {max(ratios):.2f}),"
    f" peak memory {peaks['lorax_flax'] / peaks['peft']:.2f},"
    f" time to the first step {ours / theirs:.2f}"
  )
  print(common.repeat())


if __name__ == "__main__":
  main()
