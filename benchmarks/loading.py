"""Time and peak memory of loading a checkpoint, against transformers.

  python -m benchmarks.loading
  python -m benchmarks.loading --rounds=9

A checkpoint of random float32 weights in the shape of SmolLM2-135M (Llama, 30 layers,
tied embedding) is written to a temporary folder. The two sides load it in turns, each
time in a fresh process, so that both find it in the file cache alike.

transformers maps the file: its call returns before a weight is read, and the first use
reads them. So two times are given: of the call, and until every weight was read once
(summed by numpy on both sides). Peak memory is that of the latter, less the memory of
the process after its imports. Pages of a mapped file count as the process's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SIDES = ("lorax_flax", "transformers")
SHAPE = {
  "vocab_size": 49152,
  "hidden_size": 576,
  "intermediate_size": 1536,
  "num_hidden_layers": 30,
  "num_attention_heads": 9,
  "num_key_value_heads": 3,
  "tie_word_embeddings": True,
}

Load = Callable[[Path], Iterable[Any]]


def write(folder: Path) -> None:
  """Writes the checkpoint."""
  import transformers

  config = transformers.LlamaConfig(**SHAPE)
  transformers.LlamaForCausalLM(config).save_pretrained(folder)


def ours() -> Load:
  """Imports lorax_flax; returns a loader of its weights as numpy arrays."""
  import jax
  import numpy as np

  from lorax_flax.models import registry

  jax.block_until_ready(jax.numpy.zeros(1))  # the backend is there

  def load(folder: Path) -> Iterable[Any]:
    params = jax.block_until_ready(registry.load(folder).params)
    return map(np.asarray, jax.tree.leaves(params))

  return load


def theirs() -> Load:
  """Imports transformers; returns a loader of its weights as numpy arrays."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  kind = transformers.LlamaForCausalLM  # imported now: it is looked up when named
  torch.zeros(1)

  def load(folder: Path) -> Iterable[Any]:
    model = kind.from_pretrained(folder)
    return (each.detach().numpy() for each in model.parameters())

  return load


def measure(load: Load, folder: Path) -> dict[str, float]:
  """Wall seconds, processor seconds and peak memory (bytes) of one loading."""
  before = _status("VmRSS")
  # Resets the peak, which the imports may have raised.
  Path("/proc/self/clear_refs").write_text("5")
  start, start_cpu = time.perf_counter(), time.process_time()
  leaves = load(folder)
  loaded, loaded_cpu = time.perf_counter(), time.process_time()
  total, size = 0.0, 0
  for leaf in leaves:
    total, size = total + float(leaf.sum()), size + leaf.nbytes
  return {
    "call": loaded - start,
    "call_cpu": loaded_cpu - start_cpu,
    "read": time.perf_counter() - start,
    "read_cpu": time.process_time() - start_cpu,
    "peak": _status("VmHWM") - before,
    "size": size,
    "sum": total,
    "import_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


def _status(name: str) -> int:
  """A figure of this process's memory, in bytes."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{name}:"):
      return int(line.split()[1]) * 1024
  raise RuntimeError(f"/proc/self/status has no {name}")


def _subprocess(side: str, folder: Path) -> dict[str, float]:
  """Measures a side, or writes the checkpoint, in a fresh process."""
  command = [sys.executable, "-m", "benchmarks.loading", f"--{side}={folder}"]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout or "{}")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=5)
  for task in ("write", *SIDES):  # flags of the processes that this one starts
    parser.add_argument(f"--{task}", type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.write:
    write(args.write)
  elif args.lorax_flax:
    print(json.dumps(measure(ours(), args.lorax_flax)))
  elif args.transformers:
    print(json.dumps(measure(theirs(), args.transformers)))
  else:
    compare(args.rounds)


def compare(rounds: int) -> None:
  """Measures both sides in turns, and prints the table."""
  from benchmarks import common

  turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
  with tempfile.TemporaryDirectory() as folder:
    _subprocess("write", Path(folder))
    for side in SIDES:  # once each, so that no round is the file's first
      _subprocess(side, Path(folder))
    for _ in range(rounds):
      for side in SIDES:
        turns[side].append(_subprocess(side, Path(folder)))
  sums = [turn["sum"] for side in SIDES for turn in turns[side]]
  assert max(sums) - min(sums) < 1e-3 * abs(sums[0]) + 1, "not the same weights"

  def median(side: str, name: str) -> float:
    return statistics.median(turn[name] for turn in turns[side])

  times = ("call", "call_cpu", "read", "read_cpu")
  size = turns[SIDES[0]][0]["size"]
  rows = [
    (
      side,
      *(f"{median(side, name):.2f}" for name in times),
      f"{median(side, 'peak') / 1e6:,.0f}",
      f"{median(side, 'peak') / size:.2f}",
    )
    for side in SIDES
  ]
  header = ("side", "call, s", "CPU", "all read, s", "CPU", "peak MB", "peak/weights")
  title = f"Llama-shaped, {size / 4e6:.0f}M float32 weights, medians of {rounds} rounds"
  print(common.table(title, header, rows))
  for name, about in zip(times, header[1:5], strict=True):
    ratios = [
      a[name] / b[name] for a, b in zip(*(turns[s] for s in SIDES), strict=True)
    ]
    what = about if "," in about else f"{header[1 + times.index(name) - 1]} of CPU"
    print(
      f"lorax_flax over transformers, {what}: {statistics.median(ratios):.2f}"
      f" ({min(ratios):.2f} to {max(ratios):.2f})"
    )
  print(common.repeat())


if __name__ == "__main__":
  main()
