"""Commands in processes of their own, watched until all have ended.

Each line that a command prints is printed with the command's name before it. SIGTERM
and SIGINT reach every process, and none outlives the one that started it (on Linux).
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

_POLL = 0.05  # seconds
# Becomes the command that follows, which gets SIGTERM when the process that started it
# is killed: started again, that would otherwise train what is training still. Only
# Linux can (prctl's request 1). Not between fork and exec: JAX has threads by then.
_TIED = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class End:
  """The end of a command.

  Attributes:
    code: exit code; negative, the number of the signal that ended it.
    last_line: the last line that it printed.
  """

  code: int
  last_line: str


@dataclass
class _Process:
  popen: subprocess.Popen[str]
  last_line: str = ""
  readers: list[threading.Thread] = field(default_factory=list)


def run(
  commands: Mapping[str, Sequence[str]],
  at_once: int,
  *,
  environments: Mapping[str, Mapping[str, str]] | None = None,
  stderr: int = subprocess.PIPE,
  grace: float | None = None,
  log: Callable[[str], None] = print,
) -> dict[str, End]:
  """Runs all commands, `at_once` at a time.

  After a signal to stop, which those that run get, no other is started.

  Args:
    commands: program and arguments, by name.
    at_once: largest number of processes at a time.
    environments: environment of each, by name; this process's by default.
    stderr: subprocess.PIPE prints its lines to standard error, subprocess.STDOUT to
      standard output, in their order.
    grace: seconds that the others have to end once one has failed, before they are
      killed; None lets them run.
    log: takes a line about a command that failed, where there is a grace.

  Returns:
    The end of each command that was started, in the order in which they ended; of
    several at once, those first that are the likelier cause.
  """
  waiting, started = list(commands), dict[str, _Process]()
  ends: dict[str, End] = {}
  kill_at: float | None = None

  def stop(number: int, frame: object) -> None:
    waiting.clear()
    for process in started.values():
      if process.popen.poll() is None:
        process.popen.send_signal(number)

  before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    while waiting or len(ends) < len(started):
      if waiting and len(started) - len(ends) < at_once:
        name = waiting.pop(0)
        environment = None if environments is None else environments[name]
        # The handler reads the table as it grows: an early signal is not lost.
        started[name] = _start(name, commands[name], environment, stderr)
        continue
      new = {name: p.popen.poll() for name, p in started.items() if name not in ends}
      over = {name: code for name, code in new.items() if code is not None}
      for name in sorted(over, key=lambda name: _blame(over[name])):
        ends[name] = End(over[name], "")
      failed = next((name for name, end in ends.items() if end.code), None)
      if grace is not None and failed is not None and kill_at is None:
        left = len(started) - len(ends)
        rest = f"; the other {left} have {grace:g} s to end" if left else ""
        log(f"{failed} of {len(commands)} {describe(ends[failed].code)}{rest}")
        waiting.clear()
        kill_at = time.monotonic() + grace
      if kill_at is not None and time.monotonic() > kill_at:
        for name in started.keys() - ends.keys():
          log(f"{name} has not ended, and is killed")
          started[name].popen.kill()
        kill_at = float("inf")
      time.sleep(_POLL)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  for process in started.values():
    for reader in process.readers:
      reader.join(timeout=5)
  return {name: End(end.code, started[name].last_line) for name, end in ends.items()}


def _blame(code: int) -> tuple[bool, int]:
  # One that a signal ended is the cause and not the effect; and one that ends for
  # another's sake does so with a large code.
  return code >= 0, code or sys.maxsize


def describe(code: int) -> str:
  """A failure in words: "ended with code 1", "was ended by SIGKILL"."""
  if code >= 0:
    return f"ended with code {code}"
  return f"was ended by {signal.Signals(-code).name}"


def _start(
  name: str, command: Sequence[str], environment: Mapping[str, str] | None, stderr: int
) -> _Process:
  if sys.platform == "linux":
    command = [sys.executable, "-S", "-c", _TIED, *command]
  process = _Process(
    subprocess.Popen(
      command,
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
      errors="replace",
      start_new_session=True,  # A terminal's ^C comes once, from us.
    )
  )
  pairs = (process.popen.stdout, sys.stdout), (process.popen.stderr, sys.stderr)
  for stream, out in pairs:
    if stream is not None:
      reader = threading.Thread(
        target=_copy, args=(name, process, stream, out), daemon=True
      )
      reader.start()
      process.readers.append(reader)
  return process


def _copy(name: str, process: _Process, stream: IO[str], out: IO[str]) -> None:
  with stream:
    for line in stream:
      process.last_line = line.strip() or process.last_line
      # In one write, so that the lines of two processes are not mixed.
      out.write(f"[{name}] {line.rstrip()}\n")
      out.flush()
