"""Commands in processes of their own, some at a time; each line says whose it is."""

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

_POLL = 0.05  # seconds
_PARENT_DEATH_SIGNAL = 1  # Linux's number of that request


@dataclass
class Child:
  """A process that has been started.

  Attributes:
    process: itself.
    said: the last line that it printed.
  """

  process: subprocess.Popen[str]
  said: str = ""


def run(commands: Mapping[str, Sequence[str]], most: int) -> dict[str, tuple[int, str]]:
  """Runs all commands, `most` at a time.

  A signal to stop goes to those that run; the others are not started then.

  Returns:
    Of each command that was started, its exit code and the last line that it printed.
  """
  waiting, children = list(commands), dict[str, Child]()
  readers = []
  with _stopping(children, waiting):
    while waiting or any(c.process.poll() is None for c in children.values()):
      alive = sum(c.process.poll() is None for c in children.values())
      if waiting and alive < most:
        name = waiting.pop(0)
        child = children[name] = _start(commands[name])
        reader = threading.Thread(target=_copy, args=(name, child), daemon=True)
        reader.start()
        readers.append(reader)
      else:
        time.sleep(_POLL)
  for reader in readers:
    reader.join(timeout=5)
  return {name: (c.process.returncode, c.said) for name, c in children.items()}


def _start(command: Sequence[str]) -> Child:
  return Child(
    subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      start_new_session=True,  # A terminal's ^C comes once, from us.
      preexec_fn=_ends_with_us(),
    )
  )


def _ends_with_us() -> Callable[[], object] | None:
  """Makes a process get SIGTERM when this one is killed; only Linux can.

  Given again, the command would otherwise train what is training still.
  """
  if sys.platform != "linux":
    return None
  prctl = ctypes.CDLL(None).prctl
  return lambda: prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _copy(name: str, child: Child) -> None:
  out: IO[str] | None = child.process.stdout
  assert out is not None
  with out:
    for line in out:
      child.said = line.strip() or child.said
      print(f"[{name}] {line.rstrip()}", flush=True)


@contextmanager
def _stopping(children: Mapping[str, Child], waiting: list[str]) -> Iterator[None]:
  """While entered, SIGTERM and SIGINT are passed on and do not end this process."""

  def pass_on(number, frame):
    waiting.clear()
    for child in list(children.values()):
      if child.process.poll() is None:
        child.process.send_signal(number)

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, pass_on) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
