"""Figures of a run's folder."""

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorax_flax.files import workdir as files


def figure(inches: tuple[float, float], title: str) -> Figure:
  """An empty figure with a title."""
  # Of its own canvas: pyplot would keep it, and might look for a screen.
  made = Figure(figsize=inches, layout="constrained")
  FigureCanvasAgg(made)
  # A name's $ or underscore is no formula.
  made.suptitle(title, parse_math=False)
  return made


def write(file: Path, made: Figure) -> None:
  """Writes a figure as a PNG, atomically."""
  content = io.BytesIO()
  made.savefig(content, dpi=120, format="png")
  files.write_bytes(file, content.getvalue())
