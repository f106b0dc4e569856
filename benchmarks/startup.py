"""Time from the command to the first step, with and without compiled programs kept.

  python -m benchmarks.startup
  python -m benchmarks.startup --rounds=5 --config=glue_sst2.py --config.model.scan=True

Each start is a fresh process of `experiments.run` (by default the quick start's), which
is killed after its first step. "none" has no compilation cache, "cold" an empty one,
and "warm" the one that "cold" filled. A first start that is not counted brings the
files into the system's cache.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common

STARTS = ("none", "cold", "warm")


def start(arguments: Sequence[str], folder: Path, cache: Path | None) -> list[float]:
  """Seconds to the adapter's start, of compiling the step, and to the first step.

  Raises:
    RuntimeError: the run ended before its first step.
  """
  kept = [] if cache is None else [f"--config.compilation_cache={cache}"]
  command = [sys.executable, "-u", "-m", "experiments.run", *arguments, *kept]
  command += ["--config.train.log_steps=1", f"--workdir={folder}"]
  before = time.perf_counter()
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  assert process.stdout is not None
  ready = compiling = 0.0
  printed = ""
  for line in process.stdout:
    printed += line
    passed = time.perf_counter() - before
    if re.match(r"training .* parameters:", line):
      ready = passed
    if found := re.match(r"compiled the training step .* in ([\d.]+)s", line):
      compiling = float(found[1])
    if line.startswith("step 1/"):
      process.kill()
      process.wait()
      process.stdout.close()
      return [ready, compiling, passed]
  raise RuntimeError(f"no first step:\n{printed}")


def measure(arguments: Sequence[str], rounds: int) -> dict[str, list[float]]:
  """Medians of `start` for each of STARTS."""
  found: dict[str, list[list[float]]] = {name: [] for name in STARTS}
  with tempfile.TemporaryDirectory() as scratch:
    start(arguments, Path(scratch) / "first", None)
    for number in range(rounds):
      folder = Path(scratch) / str(number)
      caches = {"none": None, "cold": folder / "programs", "warm": folder / "programs"}
      for name, cache in caches.items():
        found[name].append(start(arguments, folder / name, cache))
  return {
    name: [statistics.median(column) for column in zip(*rows, strict=True)]
    for name, rows in found.items()
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--config", default="quickstart.py")
  options, overrides = parser.parse_known_args()
  found = measure([f"--config={options.config}", *overrides], options.rounds)
  rows = [[name, *(f"{x:.1f}" for x in found[name])] for name in STARTS]
  print(
    common.table(
      f"{options.config}: seconds from the command, medians of {options.rounds}",
      ["programs kept", "adapter is there", "of compiling", "first step done"],
      rows,
    )
  )
  gain = found["none"][2] / found["warm"][2]
  print(f"A warm start takes its first step {gain:.2f} times as soon as one without.")
  print(common.repeat())


if __name__ == "__main__":
  main()
