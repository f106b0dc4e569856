"""curves.png: loss, learning rate and the evaluation's metrics over the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_flax.train.logs import picture
from lorax_flax.train.logs.chart import Series


def draw(file: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
  """Draws the lines of metrics.jsonl.

  Args:
    file: a PNG, written atomically.
    lines: each has `step` and names such as train/loss or eval/accuracy.
    title: over the panels.
  """
  shown = panels(lines)
  figure = picture.figure((12, 3.6), title)
  for place, (heading, series) in enumerate(shown, 1):
    axes = figure.add_subplot(1, len(shown), place)
    axes.set_title(heading)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    for name, points in series.items():
      x, y = zip(*points, strict=True)
      marker = "o" if name.startswith("eval/") else None
      axes.plot(x, y, marker=marker, label=name)
    if series:
      axes.legend(frameon=False)
  picture.write(file, figure)


def panels(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, Series]]:
  """The (step, value) points by name that belong together, with their headings."""
  names = {name for line in lines for name in line}
  scores = sorted(n for n in names if n.startswith("eval/") and "loss" not in n)
  chosen = {
    "loss": ["train/loss", "eval/loss"],
    "evaluation": scores,
    "learning rate": ["train/learning_rate"],
  }
  return [
    (
      heading,
      {n: [(x["step"], x[n]) for x in lines if n in x] for n in own if n in names},
    )
    for heading, own in chosen.items()
  ]
