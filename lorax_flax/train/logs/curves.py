"""curves.png: loss, learning rate and the evaluation's metrics over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_flax.train.logs import picture


def draw(file: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
  """Draws the lines of metrics.jsonl.

  Args:
    file: a PNG, written atomically.
    lines: each has `step` and names such as train/loss or eval/accuracy.
    title: over the panels.
  """
  names = {name for line in lines for name in line}
  scores = sorted(n for n in names if n.startswith("eval/") and "loss" not in n)
  panels: list[tuple[str, list[str]]] = [
    ("loss", [n for n in ("train/loss", "eval/loss") if n in names]),
    ("evaluation", scores),
    ("learning rate", [n for n in ("train/learning_rate",) if n in names]),
  ]
  figure = picture.figure((12, 3.6), title)
  for place, (heading, shown) in enumerate(panels, 1):
    axes = figure.add_subplot(1, len(panels), place)
    axes.set_title(heading)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    for name in shown:
      held = [line for line in lines if name in line]
      x, y = [line["step"] for line in held], [line[name] for line in held]
      marker = "o" if name.startswith("eval/") else None
      axes.plot(x, y, marker=marker, label=name)
    if shown:
      axes.legend(frameon=False)
  picture.write(file, figure)
