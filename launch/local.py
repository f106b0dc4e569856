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
import socket
import sys
from collections.abc import Mapping, Sequence

from launch import options
from lorax_flax.distributed import subprocesses


def environment(
  number: int, count: int, address: str, devices: int | None, base: Mapping[str, str]
) -> dict[str, str]:
  """The environment of process `number` of `count`.

  Args:
    address: address of the coordinator, which is process 0; the loopback's.
    devices: virtual CPU devices of each process; None leaves JAX to its own devices.
    base: the environment that is added to.
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
  return {**base, **mine}


def run(
  command: Sequence[str], processes: int, devices: int | None = None, grace: float = 10
) -> int:
  """Runs `python COMMAND` in several processes; returns the exit code of all.

  Args:
    command: Python's arguments.
    processes: number of processes.
    devices: virtual CPU devices of each; None leaves JAX to its own devices.
    grace: seconds that the others have to end when one has failed.
  """
  address = f"127.0.0.1:{_free_port()}"
  ends = subprocesses.run(
    {str(number): [sys.executable, *command] for number in range(processes)},
    processes,
    environments={
      str(number): environment(number, processes, address, devices, os.environ)
      for number in range(processes)
    },
    grace=grace,
    log=lambda line: print(f"launch: process {line}", file=sys.stderr, flush=True),
  )
  # They are in the order in which they ended: the first that failed is the cause.
  code = next((end.code for end in ends.values() if end.code), 0)
  return code if code >= 0 else 128 - code


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def main(argv: Sequence[str]) -> int:
  own, command = options.split(argv)
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
