"""A sweep's trials together against one after another, on the quick start's task.

  python -m benchmarks.sweeps [--steps=30] [--trials=8] [--step]
  python -m benchmarks.sweeps --trials=64 --prune=halving [--alone=4] [--workdir=DIR]

One after another is `experiments.run` for each trial, in a process of its own; together
is `experiments.sweep`, in one process. Both train the same number of steps, evaluate
once and write all their outputs. The first table has the wall time by phase, and the
number of programs that were compiled. The second has the memory of the step of one
trial and of all, from the compiler, and the minimum of some steps' seconds a trial.
--step prints the second alone.

With --prune each trial has the quick start's full epoch, and the sweep stops those that
do worse; only the first table is printed, then the steps that were taken, the ratio of
wall times, and whether the best trial is the same. More than the quick start's eight
trials are drawn at random: learning rate, rank, alpha and seed. With --alone=N only N
are run one after another, and their time is taken for all; the best of all is then that
of a sweep to the end in --workdir, which goes on where it stopped, and without a
--workdir it is left open. Accuracy is of 3,000 headlines: its standard error is half a
point.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from experiments import run
from experiments.cli import config_flag, large_pages
from experiments.sweeps import plan
from experiments.sweeps.trials import Trial
from lorax_flax.data.pipeline import LENGTH
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
  """Trials of the quick start, for a number of steps: its sweep's, or random ones."""
  found = plan.of(config_flag.choose(_SPEC, {"train.steps": str(steps)}))
  if count < 2:
    raise SystemExit("--trials: at least 2")
  if count <= len(found.changes):
    return found.make(found.changes[:count])
  rng = random.Random(0)
  return found.make([_drawn(rng) for _ in range(count)])


def _drawn(rng: random.Random) -> dict[str, Any]:
  return {
    "train.learning_rate": float(f"{10 ** rng.uniform(-4, -2):.3g}"),
    "lora.rank": rng.choice([2, 4, 8, 16]),
    "lora.alpha": rng.choice([8.0, 16.0, 32.0]),
    "seed": rng.randrange(1000),
  }


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


def _sweep(
  chosen: list[Trial], workdir: Path, given: Sequence[str]
) -> tuple[float, str, list[dict[str, Any]]]:
  """Wall seconds of a sweep of the trials, what it printed, their results."""
  with tempfile.NamedTemporaryFile("w", suffix=".py") as listed:
    listed.write(_SOME.format([dict(trial.changes) for trial in chosen]))
    listed.flush()
    wall, printed = _command(
      "sweep", f"--config={listed.name}", *given, f"--workdir={workdir}"
    )
  results = [_result(workdir / trial.name, "result.json") for trial in chosen]
  return wall, printed, results


def measure(
  chosen: list[Trial], steps: int, prune: str | None, alone: int, folder: Path | None
) -> None:
  """Prints the first table, wall time and programs, and what follows from it."""
  given = [f"--config.train.steps={steps}"]
  rows, walls, prints = [], 0.0, ""
  some = [chosen[i * len(chosen) // alone] for i in range(alone)]
  own_results: dict[str, dict[str, Any]] = {}
  with tempfile.TemporaryDirectory() as scratch:
    for trial in some:
      own = [f"--config.{name}={value}" for name, value in trial.changes.items()]
      here = Path(scratch) / trial.name
      wall, printed = _command(
        "run", f"--config={_SPEC}", *given, *own, f"--workdir={here}"
      )
      walls, prints = walls + wall, prints + printed
      own_results[trial.name] = _result(here, "result.json")
    rows.append(_row(f"{alone} alone", walls, prints, [*own_results.values()]))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    walls *= len(chosen) / alone
    options = [] if prune is None else [f"--prune={prune}"]
    sweep = Path(scratch) / "sweep"
    wall, printed, ours = _sweep(chosen, sweep, [*given, *options])
    taken = [
      steps if result else _result(sweep / trial.name, "judged.json")["pruned"]["step"]
      for trial, result in zip(chosen, ours, strict=True)
    ]
  # Of trials that take turns the last one's seconds are not those of all.
  shared = [result for result in ours[:1] if prune is None]
  rows.append(_row("together", wall, printed, shared))
  header = ["trials", "wall s", "compile", "steps", "evaluate", "save", "rest"]
  title = f"{len(chosen)} trials of {_SPEC}, {steps} steps each, {os.cpu_count()} cores"
  print(common.table(title, [*header, "programs"], rows))
  to_end = {trial.name: own for trial, own in zip(chosen, ours, strict=True) if own}
  print(
    f"together over one after another: {wall / walls:.3f} of the time, "
    f"{sum(taken) / (steps * len(chosen)):.3f} of the steps; {len(to_end)} of "
    f"{len(chosen)} trials to the end; peak memory of one alone: "
    f"{peak * 1024 / _MEGABYTE:,.0f} MB",
    flush=True,
  )
  # Those that are run to the end; nothing for the others.
  ended = [own_results.get(trial.name, {}) for trial in chosen]
  others = [to_end]
  if alone < len(chosen) and folder is not None:
    ended = _sweep(chosen, folder / "to_the_end", given)[2]
    others.append({trial.name: e for trial, e in zip(chosen, ended, strict=True)})
  differences = [
    f"{name} {max(abs(own[x] - other[name][x]) for x in ('accuracy', 'eval_loss')):.1e}"
    for other in others
    for name, own in own_results.items()
    if name in other
  ]
  if differences:
    print(f"largest difference from alone: {', '.join(differences)}")
  best = _best(ours)
  print(f"best trial, and its accuracy: together {_told(chosen, ours, best)}", end="")
  if all(ended):
    better = sum(each["accuracy"] > ours[best]["accuracy"] for each in ended)
    print(f", of all {_told(chosen, ended, _best(ended))}; {better} are better", end="")
  print()


def _told(chosen: list[Trial], results: list[dict[str, Any]], number: int) -> str:
  return f"{chosen[number].name} {results[number]['accuracy']:.4f}"


def _best(results: list[dict[str, Any]]) -> int:
  """Number of the first trial with the best accuracy."""
  return max(range(len(results)), key=lambda i: results[i].get("accuracy", 0.0))


def _result(folder: Path, name: str) -> dict[str, Any]:
  """The content of a trial's file; nothing where there is none."""
  file = folder / name
  return json.loads(file.read_text()) if file.exists() else {}


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

  one = {name: x[0] for name, x in batch.items() if name != LENGTH}
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
  parser.add_argument("--steps", type=int, help="of each trial; 30, or 250 to prune")
  parser.add_argument("--trials", type=int, default=8, help="number of trials")
  parser.add_argument("--prune", help="as of experiments.sweep")
  parser.add_argument("--alone", type=int, help="trials one after another; all")
  parser.add_argument("--workdir", type=Path, help="of the sweep without pruning")
  parser.add_argument("--step", action="store_true", help="the second table alone")
  found = parser.parse_args()
  large_pages.restart()
  steps = found.steps or (30 if found.prune is None else 250)
  chosen = _chosen(found.trials, steps)
  if not found.step:
    alone = found.alone or len(chosen)
    measure(chosen, steps, found.prune, alone, found.workdir)
  if found.prune is None:
    print(one_step(chosen))
  print(common.repeat())


if __name__ == "__main__":
  main()
