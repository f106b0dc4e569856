"""Runs a command as several processes of one run, on this machine.

  python -m launch.local --processes=2 --devices=2 -- -m experiments.run --config=…

What follows `--` is given to Python, in each process. The processes find one another
through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as
`lorax_flax.distributed.processes.initialize` reads them. Lines are printed with the
number of the process before them. SIGTERM and SIGINT go to all of them. When one fails,
the others get some seconds to end by themselves, and are killed then.

Exits with 0 where all have, else with the code of the first that failed (128 + the
number of the signal, where one ended it).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from launch import arguments
from lorax_flax.distributed import signals

_POLL = 0.05  # seconds


def environment(
  number: int, count: int, address: str, devices: int | None, given: Mapping[str, str]
) -> dict[str, str]:
  """What process `number` of `count` finds in its environment.

  Args:
    address: of the coordinator, which process 0 is; the loopback's.
    devices: virtual CPU devices of each process; None leaves JAX to its own devices.
    given: the environment that is added to.
  """
  mine = {
    "JAX_COORDINATOR_ADDRESS": address,
    # JAX would listen on every address of the machine.
    "JAX_COORDINATOR_BIND_ADDRESS": address,
    "JAX_NUM_PROCESSES": str(count),
    "JAX_PROCESS_ID": str(number),
    "PYTHONUNBUFFERED": "1",
  }
  if devices is not None:
    mine |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  return {**given, **mine}


def run(
  command: Sequence[str], processes: int, devices: int | None = None, grace: float = 10
) -> int:
  """Runs `python COMMAND` in so many processes; returns the exit code of all.

  Args:
    command: Python's arguments.
    processes, devices: how many, and virtual CPU devices of each.
    grace: seconds that the others have to end when one has failed.
  """
  address = f"127.0.0.1:{_free_port()}"
  children: list[subprocess.Popen[str]] = []
  readers = []
  # The handler reads the list as it grows: a signal that comes early is not lost.
  with signals.heard(lambda number: signals.pass_on(number, children)):
    for number in range(processes):
      child = subprocess.Popen(
        [sys.executable, *command],
        env=environment(number, processes, address, devices, os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # A terminal's ^C comes once, from us.
      )
      children.append(child)
      for stream, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
        assert stream is not None
        reader = threading.Thread(target=_copy, args=(number, stream, out), daemon=True)
        reader.start()
        readers.append(reader)
    code = _wait(children, grace)
  for reader in readers:
    reader.join(timeout=5)
  return code


def _wait(children: Sequence[subprocess.Popen[str]], grace: float) -> int:
  """Until all have ended; returns the exit code."""
  failed: tuple[int, int] | None = None
  until = float("inf")
  while True:
    codes = [child.poll() for child in children]
    ended = [(n, code) for n, code in enumerate(codes) if code]
    if failed is None and ended:
      # Of several at once, one that a signal ended is the cause and not the effect; and
      # one that ends for another's sake does so with a large code.
      failed = min(ended, key=lambda pair: (pair[1] > 0, pair[1], pair[0]))
      until = time.monotonic() + grace
      left = codes.count(None)
      rest = f"; the other {left} have {grace:g} s to end" if left else ""
      _say(f"process {failed[0]} of {len(children)} {_how(failed[1])}{rest}")
    if None not in codes:
      break
    if time.monotonic() > until:
      for number, child in enumerate(children):
        if child.poll() is None:
          _say(f"process {number} has not ended, and is killed")
          child.kill()
      until = float("inf")
    time.sleep(_POLL)
  if failed is None:
    return 0
  return failed[1] if failed[1] > 0 else 128 - failed[1]


def _how(code: int) -> str:
  if code > 0:
    return f"ended with code {code}"
  return f"was ended by {signal.Signals(-code).name}"


def _say(line: str) -> None:
  print(f"launch: {line}", file=sys.stderr, flush=True)


def _copy(number: int, stream: IO[str], out: IO[str]) -> None:
  for line in stream:
    # In one write, so that the lines of two processes are not mixed.
    out.write(f"[{number}] {line.rstrip()}\n")
    out.flush()


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def main(argv: Sequence[str]) -> int:
  own, command = arguments.split(argv)
  about, _, rest = (__doc__ or "").partition("\n")
  parser = argparse.ArgumentParser(
    prog="python -m launch.local",
    description=f"{about}\n{rest}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="%(prog)s [--processes=N] [--devices=N] [--grace=SECONDS] -- ARGUMENTS",
  )
  parser.add_argument("--processes", type=_positive, default=2)
  parser.add_argument(
    "--devices",
    type=_positive,
    help="virtual CPU devices of each process; without it, those that JAX finds",
  )
  parser.add_argument("--grace", type=float, default=10.0)
  found = parser.parse_args(own)
  if not command:
    parser.error("what shall run? Give Python's arguments after --")
  return run(command, found.processes, found.devices, found.grace)


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"at least 1, not {text}")
  return int(text)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
