"""Time from the command to the first step, with and without compiled programs kept.

  python -m benchmarks.startup
  python -m benchmarks.startup --rounds=5 --config=glue_sst2.py --config.model.scan=True
  python -m benchmarks.startup --peft

Each start is a fresh process of `experiments.run` (by default the quick start's), which
is killed after its first step. "none" keeps no compiled programs, "cold" starts with an
empty folder of them, and "warm" with the one that "cold" filled. A first start that is
not counted brings the files into the system's cache. --peft adds the quick start's
first step by a script on PEFT (benchmarks/startup_peft.py), in turns with ours.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import common
from lorax_flax.data import headlines
from lorax_flax.hub import assets

_KEEPING = "JAX_ENABLE_COMPILATION_CACHE"
STARTS = ("none", "cold", "warm")


def start(arguments: Sequence[str], folder: Path, cache: Path | None) -> list[float]:
  """Seconds to the adapter's start, of compiling the step, and to the first step.

  Raises:
    RuntimeError: the run ended before its first step.
  """
  kept = [] if cache is None else [f"--config.compilation_cache={cache}"]
  command = ["-u", "-m", "experiments.run", *arguments, *kept]
  command += ["--config.train.log_steps=1", f"--workdir={folder}"]
  ready = compiling = 0.0
  for passed, line in _lines(command, {_KEEPING: str(cache is not None)}):
    if re.match(r"training .* parameters:", line):
      ready = passed
    if found := re.match(r"compiled the training step .* in ([\d.]+)s", line):
      compiling = float(found[1])
  return [ready, compiling, passed]


def start_of_peft(folder: Path) -> list[float]:
  """Seconds to the first step of the script on PEFT, in `start`'s last place."""
  texts = folder / "texts.json"
  texts.write_text(json.dumps(headlines.load().train), "utf-8")
  script = str(Path(__file__).with_name("startup_peft.py"))
  [*_, (passed, _)] = _lines([script, str(assets.path("minilm")), str(texts)], {})
  return [math.nan, math.nan, passed]


def _lines(
  command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[float, str]]:
  """Yields seconds and line by line what is printed up to the first step, and stops it.

  Raises:
    RuntimeError: it ended before its first step.
  """
  before = time.perf_counter()
  with subprocess.Popen(
    [sys.executable, *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | environment,
  ) as process:
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
      printed += line
      yield time.perf_counter() - before, line
      if line.startswith("step 1/"):
        process.kill()
        return
  raise RuntimeError(f"no first step:\n{printed}")


def measure(
  arguments: Sequence[str], rounds: int, peft: bool
) -> dict[str, list[float]]:
  """Medians of `start` for each of STARTS, and of PEFT's."""
  found: dict[str, list[list[float]]] = {name: [] for name in STARTS}
  with tempfile.TemporaryDirectory() as scratch:
    start(arguments, Path(scratch) / "first", None)
    for number in range(rounds):
      folder = Path(scratch) / str(number)
      caches = {"none": None, "cold": folder / "programs", "warm": folder / "programs"}
      for name, cache in caches.items():
        found[name].append(start(arguments, folder / name, cache))
      if peft:
        found.setdefault("PEFT", []).append(start_of_peft(folder))
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
  parser.add_argument("--peft", action="store_true")
  options, overrides = parser.parse_known_args()
  arguments = [f"--config={options.config}", *overrides]
  found = measure(arguments, options.rounds, options.peft)
  rows = [[name, *(f"{x:.1f}" for x in row)] for name, row in found.items()]
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
