"""A sweep's trials together against one after another, on the quick start's task.

  python -m benchmarks.sweeps [--steps=30] [--trials=8] [--step]

One after another is `experiments.run` for each trial, in a process of its own; together
is `experiments.sweep`, in one process. Both train the same number of steps, evaluate
once and write all their outputs. The first table has the wall time by phase, and the
number of programs that were compiled. The second has the memory of the step of one
trial and of all, from the compiler, and the minimum of some steps' seconds a trial.
--step prints the second alone.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from experiments import run
from experiments.cli import config_flag, large_pages
from experiments.sweeps import plan
from experiments.sweeps.trials import Trial
from lorax_flax.train import loop
from lorax_flax.train.config import durations

_SPEC = "quickstart.py"
_MEGABYTE = 1e6
_TIMED = 4  # steps
# A config of some of the trials.
_SOME = """
from experiments.configs.quickstart import get_config


def sweep(add):
  for changes in {}:
    add(**changes)
"""


def _chosen(count: int, steps: int) -> list[Trial]:
  """The first trials of the quick start's sweep, for a number of steps."""
  chosen = plan.of(config_flag.choose(_SPEC, {"train.steps": str(steps)}))
  if not 1 < count <= len(chosen.changes):
    raise SystemExit(f"--trials: at least 2, and at most {len(chosen.changes)}")
  return chosen.make(chosen.changes[:count])


def _command(module: str, *arguments: str) -> tuple[float, str]:
  """Runs a command; returns its wall seconds and what it printed."""
  started = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{module}", *arguments],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return time.monotonic() - started, done.stdout


def _row(name: str, wall: float, printed: str, results: list[dict[str, Any]]) -> list:
  """A row of the first table; `results` hold seconds by phase."""
  seconds: Counter[str] = Counter()
  for result in results:
    seconds.update(result["seconds"])
  rest = wall - sum(seconds.values())
  parts = [seconds[k] for k in ("compile", "steps", "evaluate", "save")]
  return [
    name,
    *(f"{x:.1f}" for x in (wall, *parts, rest)),
    len(re.findall(r"^compiled the", printed, re.MULTILINE)),
  ]


def measure(chosen: list[Trial], steps: int) -> str:
  """The first table: wall time and programs."""
  given = [f"--config={_SPEC}", f"--config.train.steps={steps}"]
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    rows, results, walls, prints = [], [], 0.0, ""
    for trial in chosen:
      own = [f"--config.{name}={value}" for name, value in trial.changes.items()]
      here = folder / trial.name
      wall, printed = _command("run", *given, *own, f"--workdir={here}")
      walls, prints = walls + wall, prints + printed
      results.append(_result(here))
    rows.append(_row("one after another", walls, prints, results))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    sweep, listed = folder / "sweep", folder / "some.py"
    listed.write_text(_SOME.format([dict(trial.changes) for trial in chosen]))
    given[0] = f"--config={listed}"
    wall, printed = _command("sweep", *given, f"--workdir={sweep}")
    ours = [_result(sweep / trial.name) for trial in chosen]
    rows.append(_row("together", wall, printed, ours[:1]))
    largest = max(
      abs(a[name] - b[name])
      for a, b in zip(results, ours, strict=True)
      for name in ("accuracy", "eval_loss")
    )
  header = ["trials", "wall s", "compile", "steps", "evaluate", "save", "rest"]
  title = f"{len(chosen)} trials of {_SPEC}, {steps} steps each, {os.cpu_count()} cores"
  table = common.table(title, [*header, "programs"], rows)
  return (
    f"{table}\nlargest difference of accuracy and eval_loss: {largest:.1e}; "
    f"peak memory of one alone: {peak * 1024 / _MEGABYTE:,.0f} MB"
  )


def _result(folder: Path) -> dict[str, Any]:
  return json.loads((folder / "result.json").read_text())


def one_step(chosen: list[Trial]) -> str:
  """The second table: memory and seconds of the step."""
  job = run.prepare({Path(t.name): t.settings for t in chosen})
  plan = durations(job.runs[0].config, job.data.steps_per_epoch)
  alone = loop.program_of(dataclasses.replace(job, runs=job.runs[:1]), plan)
  batch = next(job.data.batches)
  base = sum(x.nbytes for x in jax.tree.leaves(job.model.params))
  rows = []

  def add(name, step, state, base, batch, count):
    with jax.set_mesh(job.model.mesh):
      compiled = step.lower(state, base, batch).compile()
    seconds = []
    for _ in range(_TIMED):
      started = time.monotonic()
      state, metrics = compiled(state, base, batch)
      jax.block_until_ready((state, metrics))
      seconds.append(time.monotonic() - started)
    found = compiled.memory_analysis()
    sizes = (found.argument_size_in_bytes, found.temp_size_in_bytes)
    cells = (f"{x / _MEGABYTE:,.0f}" for x in (*sizes, sum(sizes)))
    rows.append([name, *cells, f"{min(seconds) / count:.3f}"])

  one = {name: x[0] for name, x in batch.items()}
  add("one trial", alone.step, *alone.start(), one, 1)
  for width in (1, len(chosen)):
    made = loop.program_of(job, plan, width)
    name = f"{len(chosen)} together, {width} at once"
    add(name, made.step, *made.start(), batch, len(chosen))
  title = f"The compiled step, MB; the base alone: {base / _MEGABYTE:,.0f}"
  header = ["step", "arguments", "temporaries", "sum", "seconds a trial"]
  return common.table(title, header, rows)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=30, help="of each trial")
  parser.add_argument("--trials", type=int, default=8, help="the first N of the sweep")
  parser.add_argument("--step", action="store_true", help="the second table alone")
  found = parser.parse_args()
  large_pages.restart()
  chosen = _chosen(found.trials, found.steps)
  if not found.step:
    print(measure(chosen, found.steps), flush=True)
  print(one_step(chosen))
  print(common.repeat())


if __name__ == "__main__":
  main()
