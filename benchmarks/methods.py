"""Every method on the quick start's task: accuracy, size, time and memory.

  python -m benchmarks.methods [--seeds=3] [--steps=N] [--methods=lora,dora] [--out=PNG]
  python -m benchmarks.methods --figures=FILE

A row is the quick start with another method, and no rate or size of it is tuned. The
seeds of one method train together where it has one program for them. Accuracy is the
mean and the range over seeds of the best evaluation; seconds are those of a training
step of one seed; MB are the compiled step's arguments and temporaries, KB the adapter's
weights file. The picture has accuracy by trained parameters. What is in the file
--figures is not run again.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from experiments import run
from experiments.cli import config_flag, large_pages
from experiments.sweeps import plan, trials
from lorax_flax.errors import check_known
from lorax_flax.jobs.abstract import abstract
from lorax_flax.train.logs import picture

_SPEC = "quickstart.py"
# Methods whose delta has no alpha.
_UNSCALED = {"lora.alpha": 8.0}
_FEW = {**_UNSCALED, "train.learning_rate": 2e-2}
# Decimal orders of parameters within which names in the picture may overlap.
_BESIDE = 0.15
# What is changed in the quick start, whose rank is 8 and alpha 16; {steps} in an option
# is the number of steps.
ROWS: Mapping[str, Mapping[str, Any]] = {
  "lora": {},
  "rslora": {"lora.use_rslora": True},
  "lora, gaussian": {"lora.init": "gaussian"},
  "lora, orthogonal": {"lora.init": "orthogonal"},
  "lora, eva": {"lora.init": "eva"},
  "dora": {"lora.method": "dora"},
  "lora_bias": {"lora.method": "lora_bias"},
  "pissa": {"lora.method": "pissa"},
  "olora": {"lora.method": "olora"},
  "lora_ga": {"lora.method": "lora_ga"},
  "corda": {"lora.method": "corda"},
  "adalora": {
    "lora.method": "adalora",
    "lora.rank": 12,
    "lora.options": {"target_r": 8, "total_step": "steps"},
  },
  "loha": {"lora.method": "loha"},
  "lokr": {"lora.method": "lokr"},
  "hira": {"lora.method": "hira", **_UNSCALED},
  "gralora": {"lora.method": "gralora"},
  "miss": {"lora.method": "miss", **_UNSCALED},
  "shira": {"lora.method": "shira", **_UNSCALED},
  "supertuning": {"lora.method": "supertuning", **_UNSCALED},
  "randlora": {"lora.method": "randlora"},
  "vblora": {"lora.method": "vblora", "lora.options": {"vector_length": 128}, **_FEW},
  "vera": {"lora.method": "vera", **_FEW},
  "hra": {"lora.method": "hra", **_UNSCALED},
  "oft": {"lora.method": "oft", **_UNSCALED},
  "boft": {"lora.method": "boft", **_UNSCALED},
  "c3a": {"lora.method": "c3a", "lora.options": {"block_size": 128}, **_UNSCALED},
  "fourierft": {"lora.method": "fourierft", **_FEW},
  "delora": {"lora.method": "delora", **_UNSCALED},
  "deft": {"lora.method": "deft", **_UNSCALED},
  "ia3": {"lora.method": "ia3", **_FEW},
}


def changes(name: str, steps: int, seed: int) -> dict[str, Any]:
  """The fields of one run."""
  found = {**ROWS[name], "seed": seed, "train.steps": steps, "train.epochs": None}
  options = found.pop("lora.options", {})
  for option, value in options.items():
    found[f"lora.options.{option}"] = steps if value == "steps" else value
  return found


def measure(name: str, steps: int, seeds: int, folder: Path) -> dict[str, Any]:
  """The figures of one method."""
  each = [changes(name, steps, seed) for seed in range(seeds)]
  made = plan.of(config_flag.choose(_SPEC)).make(each)
  results: list[dict[str, Any]] = []
  for i, pack in enumerate(trials.packs(made, seeds)):
    runs = {folder / trial.name: trial.settings for trial in pack.trials}
    found = run.train(runs, folder / f"pack-{i}")
    if failed := [x for x in found if isinstance(x, Exception)]:
      raise failed[0]
    results += found
  compiled = abstract(made[0].settings, jax.devices()[:1]).compile()
  sizes = compiled.memory_analysis()
  file = folder / made[0].name / "adapter" / "adapter_model.safetensors"
  accuracies = [result["accuracy"] for result in results]
  return {
    "accuracy": sum(accuracies) / seeds,
    "range": max(accuracies) - min(accuracies),
    "trained": max(result["trained_parameters"] for result in results),
    "seconds": results[0]["seconds"]["steps"] / steps / seeds,
    "MB": (sizes.argument_size_in_bytes + sizes.temp_size_in_bytes) / 1e6,
    "KB": file.stat().st_size / 1e3,
  }


def draw(file: Path, found: Mapping[str, Mapping[str, Any]], title: str) -> None:
  """Accuracy by trained parameters, as a PNG."""
  made = picture.figure((8, 5), title)
  axes = made.add_subplot()
  axes.set_xscale("log")
  axes.set_xlabel("trained parameters, the head's included")
  axes.set_ylabel("accuracy")
  accuracies = [figures["accuracy"] for figures in found.values()]
  gap = 0.03 * (max(accuracies) - min(accuracies) or 1.0)
  labels: list[tuple[float, float]] = []
  for name, figures in sorted(found.items(), key=lambda row: -row[1]["accuracy"]):
    x, y = figures["trained"], figures["accuracy"]
    points = axes.errorbar([x], [y], [figures["range"] / 2], fmt="o", markersize=4)
    # Under those before it, in the colour of its point.
    beside = [py for px, py in labels if abs(math.log10(x / px)) < _BESIDE]
    below = min([y, *(py - gap for py in beside if py - gap < y)])
    labels.append((x, below))
    color = points.lines[0].get_color()
    axes.text(1.03 * x, below, name, fontsize=7, color=color, va="center")
  picture.write(file, made)


def _recorded(file: Path | None, key: Mapping[str, Any]) -> dict[str, Any]:
  """The figures of these settings in a file, the settings left out."""
  lines = file.read_text().splitlines() if file and file.exists() else []
  for line in map(json.loads, lines):
    if {**line, **key} == line:
      return {name: value for name, value in line.items() if name not in key}
  return {}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=250, help="of each run")
  parser.add_argument("--methods", default="", help="rows, by commas; all of them")
  parser.add_argument("--figures", type=Path, help="JSON lines, read and added to")
  parser.add_argument("--out", type=Path, default=Path("methods.png"), help="picture")
  given = parser.parse_args()
  large_pages.restart()
  chosen = given.methods.split(",") if given.methods else [*ROWS]
  for name in chosen:
    check_known("method", name, ROWS)
  found = {}
  for name in chosen:
    key = {"method": name, "steps": given.steps, "seeds": given.seeds}
    found[name] = _recorded(given.figures, key)
    if not found[name]:
      with tempfile.TemporaryDirectory() as folder:
        found[name] = measure(name, given.steps, given.seeds, Path(folder))
      if given.figures:
        with given.figures.open("a") as file:
          file.write(f"{json.dumps({**key, **found[name]})}\n")
  header = ["method", "accuracy", "range", "trained", "s a step", "MB", "KB"]
  forms = ("{:.4f}", "{:.4f}", "{:,}", "{:.3f}", "{:,.0f}", "{:,.0f}")
  rows = [
    [name, *(form.format(x) for form, x in zip(forms, row.values(), strict=True))]
    for name, row in found.items()
  ]
  title = f"{_SPEC}, {given.steps} steps, {given.seeds} seeds"
  print(common.table(title, header, rows))
  draw(given.out, found, title)
  print(f"picture: {given.out}")
  print(common.repeat())


if __name__ == "__main__":
  main()
