"""A training as its command runs it: supervised, with its results printed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.cli import command
from lorax_flax import text_table
from lorax_flax.distributed import processes, watchdog
from lorax_flax.train.logs.console import log_to_console


def supervise(train: Callable[[], None]) -> int:
  """Runs a training that is watched for lost processes; returns the exit code."""
  log_to_console()
  try:
    with watchdog.Watch(command.explain):
      train()
  except processes.Preempted as stopped:
    if processes.first():
      print(stopped, flush=True)
    return processes.PREEMPTED
  return 0


def show(result: Mapping[str, Any], workdir: Path) -> None:
  """Prints the results, and where everything is; process 0 alone."""
  if not processes.first():
    return
  numbers = {name: x for name, x in result.items() if isinstance(x, int | float)}
  rows = [(name, _number(x)) for name, x in numbers.items()]
  print(text_table.render(("Result (best evaluation)", ""), rows, align="lr"))
  for path in sorted(workdir.iterdir()):
    if not path.name.startswith("."):
      print(f"{path}{'/' if path.is_dir() else ''}")


def _number(value: float) -> str:
  small = isinstance(value, float) and abs(value) < 100
  return f"{value:,.4f}" if small else f"{value:,.0f}"
