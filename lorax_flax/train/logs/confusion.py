"""confusion.png: the number of examples by true and predicted class."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.train.logs import picture

# More classes than this have no room for numbers.
_MOST_NUMBERS = 25


def draw(file: Path, table: Mapping[str, Any], title: str) -> None:
  """Draws a confusion table.

  Args:
    file: a PNG, written atomically.
    table: `labels`, and `rows`: of each true class, the numbers by predicted class.
    title: over the picture.
  """
  labels, rows_CxC = table["labels"], np.asarray(table["rows"])
  size = min(4.0 + 0.45 * len(labels), 24.0)
  figure = picture.figure((size + 1.0, size), title)
  axes = figure.add_subplot()
  # Shares of the true class, since classes differ in size.
  shares_CxC = rows_CxC / np.maximum(rows_CxC.sum(1, keepdims=True), 1)
  shown = axes.imshow(shares_CxC, cmap="Blues", vmin=0.0, vmax=1.0)
  figure.colorbar(shown, label="share of the true class")
  short = [name if len(name) <= 24 else f"{name[:23]}…" for name in labels]
  axes.set_xticks(range(len(labels)), short, rotation=45, ha="right", parse_math=False)
  axes.set_yticks(range(len(labels)), short, parse_math=False)
  axes.set_xlabel("predicted")
  axes.set_ylabel("true")
  if len(labels) <= _MOST_NUMBERS:
    for (row, column), count in np.ndenumerate(rows_CxC):
      color = "white" if shares_CxC[row, column] > 0.5 else "black"
      axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
  picture.write(file, figure)
