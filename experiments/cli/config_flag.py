"""The --config flag: finds a config, checks the overrides, explains what there is."""

import ast
import contextlib
import re
import runpy
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments.cli import config_dict, fields
from lorax_flax.errors import LoraxError, listing, prefixed, unknown
from lorax_flax.jobs.settings import Settings
from lorax_flax.tasks import task as tasks

FOLDER = Path(__file__).parents[1] / "configs"
_NOT_CONFIGS = frozenset({"__init__", "common"})
_INDENT = 6 * " "


def names() -> dict[str, Path]:
  """Configs that come with the project: name to file."""
  files = sorted(FOLDER.glob("*.py"))
  return {file.stem: file for file in files if file.stem not in _NOT_CONFIGS}


def find(spec: str) -> tuple[Path, str | None]:
  """The file and the variant of "quickstart", "glue_rte.py:large", "my/config.py".

  A file in the working directory goes before a config of the project.

  Raises:
    LoraxError: there is none.
  """
  name, colon, variant = spec.partition(":")
  chosen = variant if colon else None
  for file in (Path(name), Path(f"{name}.py")):
    if file.is_file():
      return file, chosen
  known = names()
  stem = name.removesuffix(".py")
  if stem in known:
    return known[stem], chosen
  if "/" in name:
    raise LoraxError(f"no file {name}. Configs by name: {listing(known)}")
  raise LoraxError(unknown("config", stem, known))


def default_workdir(spec: str) -> Path:
  """Folder of a config's runs: runs/quickstart-full of "quickstart.py:full"."""
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
  """Context in which a user's file runs; whatever it raises becomes one LoraxError."""
  try:
    yield
  except LoraxError as error:
    raise LoraxError(f"{file.name}: {error}") from error
  except Exception as error:
    raise LoraxError(f"{file}: {type(error).__name__}: {error}") from error


def define(values: flags.FlagValues) -> None:
  """Defines --config; `read` reads it, with its overrides --config.NAME=VALUE."""
  flags.DEFINE_string(
    "config",
    None,
    'What to run: "quickstart.py", "glue_rte.py:large", or a file of yours. '
    "--config.NAME=VALUE changes a field of it.",
    flag_values=values,
  )


def define_overrides(values: flags.FlagValues, argv: Sequence[str]) -> None:
  """Defines the flags --config.NAME that are among the arguments.

  Their names are not checked here, where an entry of a mapping may have any.
  """
  found = [re.match(r"--?(no)?config\.([^=]+)", argument) for argument in argv]
  names = dict.fromkeys(match[2] for match in found if match)
  spec = _spec(argv)
  if spec is not None and not names.keys() <= fields.known().keys():
    load(spec)  # A task that the file registers has fields of its own.
  for name in names:
    if f"config.{name}" not in values:
      kind: Any = (
        flags.DEFINE_boolean if fields.is_switch(name) else flags.DEFINE_string
      )
      kind(f"config.{name}", None, "A field of the config.", flag_values=values)


def _spec(argv: Sequence[str]) -> str | None:
  """Config that the arguments name, the last one; None without --config."""
  found = None
  for argument, after in zip(argv, [*argv, None][1:], strict=True):
    if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
      found = after if match[1] is None else match[1]
  return found


@dataclass(frozen=True)
class Chosen:
  """A config that the command line chose.

  Attributes:
    spec: "glue_rte.py:large", as --config has it.
    values: value of each field, the overrides' too.
    overridden: fields that --config.NAME=VALUE set.
  """

  spec: str
  values: config_dict.Values
  overridden: tuple[str, ...]

  def settings(self) -> Settings:
    """Settings of the config; raises LoraxError for a value that can't be."""
    return config_dict.settings(self.values, self.overridden)


def read(values: flags.FlagValues) -> Chosen:
  """The config that the parsed flags choose.

  Raises:
    LoraxError: --config was not given, then it names those there are; what `choose`
      raises.
  """
  spec = values["config"].value
  if spec is None:
    known = ", ".join(f"{name}.py" for name in names())
    raise LoraxError(f"which config? --config=NAME; there are {known}")
  return choose(
    spec,
    {
      name.removeprefix("config."): values[name].value
      for name in values
      if name.startswith("config.") and values[name].present
    },
  )


def choose(spec: str, texts: Mapping[str, Any] | None = None) -> Chosen:
  """The config of a name, with fields set as flags set them.

  Args:
    spec: "glue_rte.py:large", or a file.
    texts: by field, the text of its flag, or a bool.

  Raises:
    LoraxError: no such config, no such field, or a value of another type.
  """
  found = config_dict.values(load(spec))
  texts = texts or {}
  for name, text in texts.items():
    with prefixed(f"--config.{name}={text}"):
      value = text if isinstance(text, bool) else fields.parse(name, text)
      found = config_dict.change(found, name, value)
  return Chosen(spec, found, tuple(texts))


def help_text(argv: Sequence[str]) -> str:
  """Configs for --help, and the fields of the one among the arguments."""
  lines = ["Configs (--config=NAME, variants after a colon):"]
  width = max(map(len, names())) + 3
  for name, file in names().items():
    module = ast.parse(file.read_text("utf-8"))
    about = ast.get_docstring(module) or ""
    variants = ", ".join(dict.fromkeys(re.findall(r"`(:\w+)`", about)))
    lines.append(f"  {name + '.py':<{width}}  {about.splitlines()[0]}  [{variants}]")
  spec = _spec(argv) or "quickstart.py"
  values = config_dict.complete(config_dict.values(load(spec)))
  known = fields.of_task(values["data.task"])
  lines += ["", f"Fields of {spec} (--config.NAME=VALUE, or .NAME.KEY of a mapping):"]
  for name, value in values.items():
    lines += [f"  {name} = {value!r}", *_wrapped(known[name].help)]
  lines += ["", "Fields of other tasks (--config.data.task=NAME):"]
  for name, field in fields.known().items():
    if name not in known:
      others = [task for task in tasks.TASKS if name in fields.of_task(task)]
      lines += [f"  {name} ({', '.join(others)})", *_wrapped(field.help)]
  return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
  return textwrap.wrap(text, 88, initial_indent=_INDENT, subsequent_indent=_INDENT)
