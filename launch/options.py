"""A launcher's options: a frozen dataclass whose fields are its flags."""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorax_flax.errors import LoraxError

REQUIRED: Any = dataclasses.MISSING


def option(default: Any, help: str, least: int = 0) -> Any:
  """A field that is also a flag: `num_slices` is --num-slices.

  Args:
    default: `REQUIRED` for none; () for a flag that may be repeated.
    help: the flag's line in --help.
    least: smallest number that is allowed.
  """
  return field(default=default, metadata={"help": help, "least": least})


SEND = option((), "a file or folder here to send too, such as a config of yours")


@dataclass(frozen=True, kw_only=True)
class Options:
  """Options of every launcher; each launcher adds its own in a subclass.

  Raises:
    LoraxError: a name that one of the clusters would not take, an `env` that is not
      NAME=VALUE, a number that is too small.
  """

  name: str = option(
    REQUIRED, "the job's name: small letters, digits, hyphens; up to 40"
  )
  env: tuple[str, ...] = option((), "NAME=VALUE for the environment of every process")
  extra: tuple[str, ...] = option(
    (), "a flag for the client, passed on as it is: --extra=--labels=team=a"
  )

  def __post_init__(self):
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
      raise LoraxError(
        f"--name={self.name}: small letters, digits and hyphens, up to 40, starting "
        "with a letter"
      )
    for setting in self.env:
      if not re.fullmatch(r"[A-Za-z_]\w*=.*", setting):
        raise LoraxError(f"--env={setting}: write it as NAME=VALUE")
    for each in dataclasses.fields(self):
      value, least = getattr(self, each.name), each.metadata["least"]
      if type(value) is int and value < least:
        raise LoraxError(f"{_flag(each.name)} must be at least {least}, not {value}")


OptionsT = TypeVar("OptionsT", bound=Options)


def parser(options: type[Options], prog: str, about: str) -> argparse.ArgumentParser:
  """A parser of the options' flags, and of --print.

  Args:
    prog: the command, "python -m launch.slurm".
    about: text that --help shows.
  """
  made = argparse.ArgumentParser(
    prog=prog,
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="%(prog)s --name=NAME [FLAGS] -- PYTHON'S ARGUMENTS",
    allow_abbrev=False,
  )
  types_by_name = typing.get_type_hints(options)
  for each in dataclasses.fields(options):
    settings = _argument(each, types_by_name[each.name])
    made.add_argument(_flag(each.name), **settings, help=each.metadata["help"])
  made.add_argument(
    "--print",
    action="store_true",
    help="print the calls as a bash script, and run nothing",
  )
  return made


def parsed(options: type[OptionsT], flags: argparse.Namespace) -> OptionsT:
  """The options that a parser found.

  Raises:
    LoraxError: an impossible value.
  """
  values: Any = {name: v for name, v in vars(flags).items() if name != "print"}
  lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
  return options(**values | lists)


def split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
  """The arguments before the first `--`, and those after it."""
  if "--" not in argv:
    return argv, ()
  at = list(argv).index("--")
  return argv[:at], argv[at + 1 :]


def _argument(each: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
  """Arguments of argparse's `add_argument` for a field of a type."""
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
