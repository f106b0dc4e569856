"""The --config flag: finds a config, checks the overrides, explains what there is."""

import ast
import contextlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lorax_flax.errors import LoraxError, listing, unknown

FOLDER = Path(__file__).parents[1] / "configs"
_NOT_CONFIGS = frozenset({"__init__", "common"})


def names() -> dict[str, Path]:
  """The configs that come with the project: name to file."""
  files = sorted(FOLDER.glob("*.py"))
  return {file.stem: file for file in files if file.stem not in _NOT_CONFIGS}


def find(spec: str) -> tuple[Path, str | None]:
  """The file and the variant of "quickstart", "glue_rte.py:large", "my/config.py".

  A file in the working directory goes before a config of the project.

  Raises:
    LoraxError: there is none.
  """
  name, colon, variant = spec.partition(":")
  wanted = variant if colon else None
  for file in (Path(name), Path(f"{name}.py")):
    if file.is_file():
      return file, wanted
  known = names()
  stem = name.removesuffix(".py")
  if stem in known:
    return known[stem], wanted
  if "/" in name:
    raise LoraxError(f"no file {name}. Configs by name: {listing(known)}")
  raise LoraxError(unknown("config", stem, known))


def default_workdir(spec: str) -> Path:
  """runs/quickstart-full of "quickstart.py:full"."""
  name, _, variant = spec.partition(":")
  parts = (Path(name).stem, variant)
  return Path("runs") / "-".join(re.sub(r"\W+", "_", p) for p in parts if p)


def load(spec: str) -> ConfigDict:
  """The config that `spec` names, locked.

  Raises:
    LoraxError: there is none, or its file does not run or has no `get_config`.
  """
  file, variant = find(spec)
  with running(file):
    get_config = runpy.run_path(str(file)).get("get_config")
    if get_config is None:
      raise LoraxError("it has no function get_config")
    config = get_config() if variant is None else get_config(variant)
  if not isinstance(config, ConfigDict):
    raise LoraxError(f"{file}: get_config returned no ConfigDict")
  return config.lock()


def function(spec: str, name: str) -> Callable[..., Any] | None:
  """A function of the file that `spec` names; None where it has none of that name.

  It is the user's: call it under `running`.

  Raises:
    LoraxError: there is no such file, or it does not run.
  """
  file, _ = find(spec)
  with running(file):
    return runpy.run_path(str(file)).get(name)


@contextlib.contextmanager
def running(file: Path) -> Iterator[None]:
  """While a user's file runs, of which anything may come: one message says what."""
  try:
    yield
  except LoraxError as error:
    raise LoraxError(f"{file.name}: {error}") from error
  except Exception as error:
    raise LoraxError(f"{file}: {type(error).__name__}: {error}") from error


def define(
  values: flags.FlagValues, sys_argv: list[str] | None = None
) -> flags.FlagHolder:
  """Defines --config, with overrides --config.NAME=VALUE.

  Args:
    values: where to.
    sys_argv: the arguments that overrides are looked for in; sys.argv by default.
  """
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    'What to run: "quickstart.py", "glue_rte.py:large", or a file of yours. '
    "--config.NAME=VALUE changes a field of it.",
    flag_values=values,
    sys_argv=sys_argv,
  )
  values["config"].parser = _Parser(sys_argv)
  return holder


def given(config: flags.FlagHolder) -> ConfigDict:
  """The value of --config.

  Raises:
    LoraxError: it was not given; it names those there are.
  """
  if config.value is None:
    known = ", ".join(f"{name}.py" for name in names())
    raise LoraxError(f"which config? --config=NAME; there are {known}")
  return config.value


class _Parser(flags.ArgumentParser):
  """From the flag's text to a ConfigDict that has every field overridden."""

  def __init__(self, argv: list[str] | None):
    self._argv = argv

  def parse(self, argument: str) -> ConfigDict:
    config = load(argument)
    for name in overridden(sys.argv if self._argv is None else self._argv):
      check_field(config, name)
    return config


def overridden(argv: Sequence[str]) -> list[str]:
  """The fields that --config.NAME=VALUE arguments name."""
  found = (re.match(r"--?(no)?config\.([^=]+)", argument) for argument in argv)
  return [match[2] for match in found if match]


def check_field(config: ConfigDict, name: str) -> None:
  """Raises LoraxError unless the config has this field, "train.steps"."""
  fields = dict(_fields(config))
  if any(field.startswith(f"{name}.") for field in fields):
    inside = [field for field in fields if field.startswith(f"{name}.")]
    raise LoraxError(
      f"config.{name} is a section; give one of its fields: {listing(inside)}"
    )
  if name not in fields:
    last = name.rpartition(".")[2]
    # "rank" for "lora.rank" is no misspelling that letters show.
    ends = [field for field in fields if field.rpartition(".")[2] == last]
    if ends:
      raise LoraxError(
        f"unknown config field {name!r}; did you mean {' or '.join(map(repr, ends))}?"
      )
    raise LoraxError(unknown("config field", name, fields))


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
  for name in config:
    value = config[name]
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def help_text(argv: Sequence[str]) -> str:
  """What --help says of configs; with --config=… among the arguments, of its fields."""
  lines = ["Configs (--config=NAME, variants after a colon):"]
  width = max(map(len, names())) + 3
  for name, file in names().items():
    module = ast.parse(file.read_text("utf-8"))
    about = ast.get_docstring(module) or ""
    variants = ", ".join(dict.fromkeys(re.findall(r"`(:\w+)`", about)))
    lines.append(f"  {name + '.py':<{width}}  {about.splitlines()[0]}  [{variants}]")
  asked = [a.partition("=")[2] for a in argv if re.match(r"--?config=", a)]
  chosen = asked[-1] if asked else "quickstart.py"
  lines += ["", f"Fields of {chosen} (--config.NAME=VALUE):"]
  lines += [f"  {name} = {value!r}" for name, value in _fields(load(chosen))]
  return "\n".join(lines)
