"""Commands in processes of their own, some at a time; each line says whose it is."""

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from lorax_flax.distributed import signals

_POLL = 0.05  # seconds
# Becomes the command that follows, which gets SIGTERM when the process that started it
# is killed: given again, the sweep would otherwise train what is training still. Only
# Linux can (prctl's request 1). Not between fork and exec: JAX has threads by then.
_TIED = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""


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

  def stop(number: int) -> None:
    waiting.clear()
    signals.pass_on(number, [child.process for child in children.values()])

  with signals.heard(stop):
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
  if sys.platform == "linux":
    command = [sys.executable, "-S", "-c", _TIED, *command]
  return Child(
    subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      start_new_session=True,  # A terminal's ^C comes once, from us.
    )
  )


def _copy(name: str, child: Child) -> None:
  out: IO[str] | None = child.process.stdout
  assert out is not None
  with out:
    for line in out:
      child.said = line.strip() or child.said
      print(f"[{name}] {line.rstrip()}", flush=True)
