"""Progress of training on the console: a bar in a terminal, else one line at a time."""

from collections.abc import Sequence
from typing import Self

from rich import console as rich_console
from rich import progress as rich_progress

from lorax_flax.train.logs import console, memory


class Display:
  """Progress with loss, speed, peak memory and time left.

  In a terminal a bar, redrawn in place; elsewhere (a file, a pipe) each update is a
  line that reads by itself.
  """

  def __init__(self, total: int, done: int, unit: str, quiet: bool = False):
    """Starts at `done` of `total` steps; `unit` is what speed is counted in."""
    self.total, self._unit = total, unit
    self._console = rich_console.Console(quiet=True) if quiet else console.CONSOLE
    self._bar = rich_progress.Progress(
      rich_progress.TextColumn("step {task.completed}/{task.total}"),
      rich_progress.BarColumn(),
      rich_progress.TextColumn("{task.fields[status]}"),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task("train", total=total, completed=done, status="")

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(self, *error) -> None:
    self._bar.stop()

  def step(self, step: int) -> None:
    """Moves the bar."""
    self._bar.update(self._task, completed=step)

  def update(
    self,
    step: int,
    epoch: float,
    losses: Sequence[float],
    rates: Sequence[float],
    speed: float,
    peak: int,
    left: float,
  ) -> None:
    """New figures.

    Args:
      losses, rates: mean loss and learning rate of each run.
      speed: units of throughput per second, of all runs together.
      peak: bytes of memory, as `memory.peak` has them.
      left: estimated seconds to the end.
    """
    loss = _span(losses, ".4f")
    rest = f"peak {memory.show(peak)}  {duration(left)} left"
    status = f"loss {loss}  {speed:,.0f} {self._unit}/s  {rest}"
    self._bar.update(self._task, completed=step, status=status)
    if not self._console.is_terminal:
      rate = _span(rates, ".2e")
      line = f"step {step}/{self.total}  epoch {epoch:.2f}  lr {rate}  {status}"
      self._console.print(line, markup=False)


def _span(values: Sequence[float], form: str) -> str:
  """The value, or the least and the largest of several."""
  low, high = (f"{value:{form}}" for value in (min(values), max(values)))
  return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
  """Seconds as 42s, 3m05s or 2h07m."""
  rounded = round(max(0.0, seconds))
  if rounded < 60:
    return f"{rounded}s"
  if rounded < 3600:
    return f"{rounded // 60}m{rounded % 60:02}s"
  return f"{rounded // 3600}h{rounded % 3600 // 60:02}m"
