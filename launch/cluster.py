"""What every launcher shares: options, quoting, and running a cluster's own client.

A launcher renders calls of its client (`gcloud`, `sbatch`, …) from a command and
options, which is a pure function, and this module prints or runs them. What is printed
is a bash script that does the very same.
"""

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from launch import arguments
from lorax_flax.errors import LoraxError

# Files that a client reads, which it is told to take from here.
FOLDER = Path("runs") / "launch"
# What a run needs of the project.
_SENT = (
  *("setup.cfg", "pyproject.toml", "README.md"),
  *("lorax_flax", "experiments", "launch"),
)
# The commands that ask the cluster who their other processes are, and how.
_DISTRIBUTED = (("-m", "experiments.run"), ("-m", "experiments.sweep"))


@dataclass(frozen=True)
class Call:
  """One call of a program.

  Attributes:
    argv: the program and its arguments.
    stdin: what it is given to read.
    files: files to write before, by their paths.
  """

  argv: tuple[str, ...]
  stdin: str | None = None
  files: Mapping[str, str] = field(default_factory=dict)


REQUIRED: Any = dataclasses.MISSING


def option(default: Any, help: str, least: int = 0) -> Any:
  """A field of options, which is a flag too: `num_slices` is --num-slices.

  Args:
    default: `REQUIRED` for none. Of a flag that may be repeated, ().
    help: what --help says of it.
    least: that a number can be.
  """
  return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True, kw_only=True)
class Options:
  """What every launcher takes; each adds its own.

  Raises:
    LoraxError: a name that one of the clusters would not take, a setting of the
      environment that is none.
  """

  name: str = option(REQUIRED, "of the job: small letters, digits, hyphens; up to 40")
  env: tuple[str, ...] = option((), "NAME=VALUE, for the environment of every process")
  extra: tuple[str, ...] = option(
    (), "a flag that the client is given as it is: --extra=--labels=team=a"
  )

  def __post_init__(self):
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
      raise LoraxError(
        f"--name={self.name}: small letters, digits and hyphens, up to 40, the first "
        "of them a letter"
      )
    for setting in self.env:
      if not re.fullmatch(r"[A-Za-z_]\w*=.*", setting):
        raise LoraxError(f"--env={setting}: NAME=VALUE is wanted")
    for each in dataclasses.fields(self):
      value, least = getattr(self, each.name), each.metadata["least"]
      if type(value) is int and value < least:
        raise LoraxError(f"{_flag(each.name)} must be at least {least}, not {value}")


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, kw_only=True)
class Engine(Generic[OptionsT]):
  """A way to run a command on a cluster.

  Attributes:
    name: of the launcher, `launch.NAME`.
    client: the program that does it, on the PATH.
    install: how to get the client.
    options: the options' class.
    render: from Python's arguments and options to calls; a pure function.
  """

  name: str
  client: str
  install: str
  options: type[OptionsT]
  render: Callable[[Sequence[str], OptionsT], list[Call]]


def python(
  interpreter: str, command: Sequence[str], env: Sequence[str], cluster: bool
) -> str:
  """A line of shell: `python COMMAND`, quoted.

  Args:
    env: NAME=VALUE each.
    cluster: whether a training run is to ask the cluster who the others are
      (--distributed); otherwise the environment tells it.

  Raises:
    LoraxError: no command; a line break in an argument, that no client carries safely.
  """
  if not command:
    raise LoraxError("what shall run? Give Python's arguments after --")
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


def flags(given: Mapping[str, Any]) -> list[str]:
  """Flags of a client, but for those that are None."""
  return [f"--{name}={value}" for name, value in given.items() if value is not None]


def install(extras: str) -> str:
  """A line of shell that installs the code of the folder it is in, once.

  TPU VMs come with an older Python than JAX takes; uv brings one.
  """
  return (
    "{ [ -x .venv/bin/python ] || { python3 -m pip install -q --user uv && "
    "python3 -m uv venv -q --python=3.12 .venv && python3 -m uv pip install -q "
    f"--python=.venv/bin/python -e '.[{extras}]'; }}; }}"
  )


def script(calls: Sequence[Call]) -> str:
  """A bash script that makes the calls, up to the first that fails."""
  lines = ["set -e"]
  for call in calls:
    for path, text in call.files.items():
      lines.append(f"mkdir -p {shlex.quote(os.path.dirname(path))}")
      lines.append(f"cat > {shlex.quote(path)} {_here(text)}")
    line = shlex.join(call.argv)
    lines.append(line if call.stdin is None else f"{line} {_here(call.stdin)}")
  return "\n".join(lines) + "\n"


def _here(text: str) -> str:
  """A here-document; its end is a word that is no line of the text."""
  end = "EOF"
  while end in text.split("\n"):
    end += "_"
  return f"<<'{end}'\n{text.removesuffix(chr(10))}\n{end}"


def submit(engine: Engine[OptionsT], command: Sequence[str], options: OptionsT) -> int:
  """Makes the engine's calls; returns the exit code of the first that fails, or 0.

  Raises:
    LoraxError: the client is not installed; what `render` raises.
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


def packed(name: str, send: Sequence[str]) -> tuple[str, list[Call]]:
  """The project's code as an archive, and the calls that pack it.

  Args:
    name: of the job.
    send: files and folders that are packed as well, by their paths from here.

  Raises:
    LoraxError: the code is not here, or nothing of a name in `send`.
  """
  root = Path(__file__).resolve().parents[1]
  if not (root / "setup.cfg").is_file():
    raise LoraxError(
      "the code that is to be sent is installed here, and not checked out: install it "
      "with pip install -e"
    )
  for path in send:
    if Path(path).is_absolute() or not Path(path).exists():
      raise LoraxError(f"--send={path}: a file or folder below this one is wanted")
  archive = f"{FOLDER}/{name}.tar.gz"
  pack = ["tar", "-czf", archive, "--exclude=__pycache__", *send]
  return archive, [
    Call(("mkdir", "-p", str(FOLDER))),
    Call((*pack, "-C", str(root), *_SENT)),
  ]


def laid_out(name: str, send: Sequence[str]) -> tuple[str, list[Call]]:
  """The project's code in a folder that holds nothing else, as `packed` has it."""
  archive, calls = packed(name, send)
  folder = f"{FOLDER}/{name}"
  calls += [
    Call(("rm", "-rf", folder)),
    Call(("mkdir", folder)),
    Call(("tar", "-xzf", archive, "-C", folder)),
  ]
  return folder, calls


def main(engine: Engine[Any], about: str | None, argv: Sequence[str]) -> int:
  """A launcher's command; returns its exit code.

  Args:
    about: the module's docstring, which --help shows.
    argv: the arguments, `-- PYTHON'S ARGUMENTS` at the end.
  """
  own, command = arguments.split(argv)
  parser = _parser(engine, about or "")
  found = vars(parser.parse_args(own))
  shown = found.pop("print")
  if not command:
    parser.error("what shall run? Give Python's arguments after --")
  try:
    options = _options(engine, found)
    if shown:
      print(script(engine.render(command, options)), end="")
      return 0
    return submit(engine, command, options)
  except (LoraxError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def read(engine: Engine[OptionsT], argv: Sequence[str]) -> OptionsT:
  """A launcher's options from its flags, as on its command line.

  Raises:
    LoraxError: a value that can't be.
  """
  found = vars(_parser(engine, "").parse_args(argv))
  del found["print"]
  return _options(engine, found)


def _options(engine: Engine[OptionsT], found: Mapping[str, Any]) -> OptionsT:
  given: Any = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
  return engine.options(**given)


def _parser(engine: Engine[Any], about: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"python -m launch.{engine.name}",
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="%(prog)s --name=NAME [FLAGS] -- PYTHON'S ARGUMENTS",
    allow_abbrev=False,
  )
  kinds = typing.get_type_hints(engine.options)
  for each in dataclasses.fields(engine.options):
    parser.add_argument(
      _flag(each.name), **_how(each, kinds[each.name]), help=each.metadata["help"]
    )
  parser.add_argument(
    "--print",
    action="store_true",
    help="show what would be run, as a bash script, and run nothing",
  )
  return parser


def _how(each: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
  """What argparse is told of a field."""
  if each.default is dataclasses.MISSING:
    return {"required": True, "type": kind}
  if kind is bool:
    return {"action": "store_true"}
  if typing.get_origin(kind) is tuple:
    return {"action": "append", "default": [], "metavar": "TEXT"}
  if typing.get_origin(kind) is types.UnionType:
    kind = typing.get_args(kind)[0]
  return {"type": kind, "default": each.default}


def _flag(name: str) -> str:
  return "--" + name.replace("_", "-")
