"""Calls of a cluster's own client, and the bash script that makes the same calls."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorax_flax.errors import LoraxError

# Commands that can ask the cluster for the addresses of their other processes.
_DISTRIBUTED = (("-m", "experiments.run"), ("-m", "experiments.sweep"))


@dataclass(frozen=True)
class Call:
  """One call of a program.

  Attributes:
    argv: the program and its arguments.
    stdin: text for its standard input.
    files: texts of files to write first, by path.
  """

  argv: tuple[str, ...]
  stdin: str | None = None
  files: Mapping[str, str] = field(default_factory=dict)


def python(
  interpreter: str, command: Sequence[str], env: Sequence[str], cluster: bool
) -> str:
  """A line of shell, `INTERPRETER COMMAND`, quoted.

  Args:
    env: settings of the environment, NAME=VALUE each.
    cluster: a training run gets --distributed, and asks the cluster for its other
      processes; otherwise the environment names them.

  Raises:
    LoraxError: an empty command; a line break in an argument, which no client carries
      safely.
  """
  if not command:
    raise LoraxError("nothing to run: give Python's arguments after --")
  command = list(command)
  if (
    cluster
    and tuple(command[:2]) in _DISTRIBUTED
    and not any(re.match(r"--?(no)?distributed\b", a) for a in command)
  ):
    command.append("--distributed")
  for argument in (*command, *env):
    if re.search(r"[\x00-\x1f\x7f]", argument):
      raise LoraxError(f"a line break or a control character in {argument!r}")
  words = ["env", *env] if env else []
  return shlex.join([*words, interpreter, *command])


def flags(options: Any, *names: str) -> list[str]:
  """Flags of a client from the attributes of these names, less those that are None."""
  values = {name.replace("_", "-"): getattr(options, name) for name in names}
  return [f"--{name}={value}" for name, value in values.items() if value is not None]


def script(calls: Sequence[Call]) -> str:
  """A bash script that makes the calls, and stops at the first that fails."""
  lines = ["set -e"]
  for call in calls:
    for path, text in call.files.items():
      lines.append(f"mkdir -p {shlex.quote(os.path.dirname(path))}")
      lines.append(f"cat > {shlex.quote(path)} {_here(text)}")
    line = shlex.join(call.argv)
    lines.append(line if call.stdin is None else f"{line} {_here(call.stdin)}")
  return "\n".join(lines) + "\n"


def _here(text: str) -> str:
  """A here-document; its delimiter is not a line of the text."""
  end = "EOF"
  while end in text.split("\n"):
    end += "_"
  return f"<<'{end}'\n{text.removesuffix(chr(10))}\n{end}"
