"""A process that has started others is told to stop, and they with it."""

import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def heard(told: Callable[[int], None]) -> Iterator[None]:
  """Context in which SIGTERM and SIGINT go to `told` instead of ending the process."""
  numbers = (signal.SIGTERM, signal.SIGINT)
  handler = lambda number, frame: told(number)
  before = {number: signal.signal(number, handler) for number in numbers}
  try:
    yield
  finally:
    for number, old in before.items():
      signal.signal(number, old)


def pass_on(number: int, children: Sequence[subprocess.Popen[str]]) -> None:
  """Sends a signal to those that still run."""
  for child in children:
    if child.poll() is None:
      child.send_signal(number)
