"""Engines: the ways to run a command on a cluster, and the command of a launcher.

A launcher's `render` is a pure function from a command and options to calls of the
cluster's own client (`gcloud`, `sbatch`, …). Here they are made, or printed as the bash
script that makes them.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from launch import options as launch_options
from launch.calls import Call, script
from launch.options import OptionsT
from lorax_flax.errors import LoraxError


@dataclass(frozen=True, kw_only=True)
class Engine(Generic[OptionsT]):
  """A way to run a command on a cluster.

  Attributes:
    name: the launcher's, `launch.NAME`.
    client: name of the cluster's program, on the PATH.
    install: advice on how to get the client.
    options: class of the options.
    render: pure function from Python's arguments and the options to calls.
  """

  name: str
  client: str
  install: str
  options: type[OptionsT]
  render: Callable[[Sequence[str], OptionsT], list[Call]]


def submit(engine: Engine[OptionsT], command: Sequence[str], options: OptionsT) -> int:
  """Makes the engine's calls; returns the exit code of the first that fails, or 0.

  Raises:
    LoraxError: the client is not installed; also the errors of `render`.
  """
  calls = engine.render(command, options)
  for program in dict.fromkeys(call.argv[0] for call in calls):
    if shutil.which(program) is None:
      how = engine.install if program == engine.client else f"install {program}"
      raise LoraxError(f"{program} is not on the PATH: {how}")
  for call in calls:
    for path, text in call.files.items():
      Path(path).parent.mkdir(parents=True, exist_ok=True)
      Path(path).write_text(text, "utf-8")
    done = subprocess.run(call.argv, input=call.stdin, text=True, check=False)
    if done.returncode:
      code = done.returncode
      return code if code > 0 else 128 - code
  return 0


def main(engine: Engine[Any], about: str | None, argv: Sequence[str]) -> int:
  """Runs a launcher's command; returns its exit code.

  Args:
    about: the module's docstring, shown by --help.
    argv: flags, then `-- PYTHON'S ARGUMENTS`.
  """
  own, command = launch_options.split(argv)
  parser = _parser(engine, about or "")
  flags = parser.parse_args(own)
  if not command:
    parser.error("nothing to run: give Python's arguments after --")
  try:
    options = launch_options.parsed(engine.options, flags)
    if flags.print:
      print(script(engine.render(command, options)), end="")
      return 0
    return submit(engine, command, options)
  except (LoraxError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def read(engine: Engine[OptionsT], argv: Sequence[str]) -> OptionsT:
  """Reads a launcher's options from its flags, as on its command line.

  Raises:
    LoraxError: an impossible value.
  """
  return launch_options.parsed(engine.options, _parser(engine, "").parse_args(argv))


def _parser(engine: Engine[Any], about: str) -> Any:
  prog = f"python -m launch.{engine.name}"
  return launch_options.parser(engine.options, prog, about)
