"""Figures of a run's folder."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_flax.files import workdir as files

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def figure(inches: tuple[float, float], title: str) -> "Figure":
  """An empty figure with a title."""
  # Here, since no step waits for a picture.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # Of its own canvas: pyplot would keep it, and might look for a screen.
  made = Figure(figsize=inches, layout="constrained")
  FigureCanvasAgg(made)
  # A name's $ or underscore is no formula.
  made.suptitle(title, parse_math=False)
  return made


def write(file: Path, made: "Figure") -> None:
  """Writes a figure as a PNG, atomically."""
  content = io.BytesIO()
  made.savefig(content, dpi=120, format="png")
  files.write_bytes(file, content.getvalue())
