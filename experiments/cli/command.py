"""Flags, help, and errors without a traceback, shared by all commands.

A command keeps its flags in a `FlagValues` of its own, so that two commands can be
imported into one process (tests do) although both have, say, `--base`:

    FLAGS = flags.FlagValues()
    BASE = flags.DEFINE_string("base", None, "…", flag_values=FLAGS, required=True)

    if __name__ == "__main__":
      cli.run(main, FLAGS)
"""

import errno
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from experiments.cli import config_flag
from lorax_flax.errors import LoraxError

# The system's refusals that are the user's to mend, and not a fault of ours.
_USERS_ERRNOS = frozenset(
  {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
  }
)
_HELP = frozenset({"-h", "-help", "--help", "--helpshort"})


def run(
  main: Callable[[], int | None],
  values: flags.FlagValues,
  more_help: Callable[[Sequence[str]], str] | None = None,
  argv: Sequence[str] | None = None,
) -> NoReturn:
  """Runs a command and exits: 0, or 1 with one message on standard error.

  Args:
    main: the command; reads its flags from `values`, may return an exit code.
    values: the command's flags, parsed together with absl's own.
    more_help: takes the arguments and returns what `--help` prints after the
      module's docstring and its flags.
    argv: the program's name and its arguments; sys.argv by default.
  """
  argv = sys.argv if argv is None else argv
  if _requests_help(argv):
    print(_help(values, argv, more_help))
    sys.exit(0)
  try:
    app.run(
      lambda argv: _quietly(main),
      argv=list(argv),
      flags_parser=lambda argv: parse(values, argv),
    )
  except KeyboardInterrupt as error:
    print(explain(error), file=sys.stderr)
    sys.exit(130)
  except (LoraxError, OSError) as error:
    message = explain(error)
    if message is None:
      raise
    print(message, file=sys.stderr)
    sys.exit(1)
  raise AssertionError("absl's app.run returned")


def explain(error: BaseException) -> str | None:
  """Message of an error for the user; None where it is a fault of ours."""
  if isinstance(error, KeyboardInterrupt):
    return "interrupted"
  if isinstance(error, LoraxError):
    return f"error: {error}"
  if isinstance(error, OSError) and error.errno in _USERS_ERRNOS:
    where = f": {error.filename}" if error.filename else ""
    return f"error: {error.strerror}{where}"
  return None


def _quietly(main: Callable[[], int | None]) -> int | None:
  """Runs main with what other libraries report left out, unless --v asks for it."""
  if not flags.FLAGS["verbosity"].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
    # What we report ourselves (a download, its size) is meant for the user.
    logging.getLogger("lorax_flax").setLevel(logging.INFO)
    _quiet_writers()
  return main()


def _quiet_writers() -> None:
  """Silences Orbax's threads: their errors reach us, and are logged once, by us."""
  absl_logging.get_absl_logger().addFilter(lambda line: "/orbax/" not in line.pathname)
  usual = sys.unraisablehook

  def hook(unraisable):
    # Of a writer that was given up, and reports to a loop that is gone.
    if str(unraisable.exc_value) != "Event loop is closed":
      usual(unraisable)

  sys.unraisablehook = hook


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """Parses argv (with the program's name first) into `values` and absl's flags.

  Returns:
    The program's name, in a list, as absl wants it.

  Raises:
    LoraxError: an unknown, missing or mistyped flag, or a positional argument.
  """
  if "config" in values:
    config_flag.define_overrides(values, argv)
  # One parse for both: the absl flags (--v, --logtostderr) and the command's own.
  known = flags.FlagValues()
  known.append_flag_values(values)
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if name == flag.name and name not in known:
      known[name] = flag
  try:
    rest = known(list(argv))
  except flags.Error as error:
    raise LoraxError(f"{_message(error)} (--help lists the flags)") from error
  values.mark_as_parsed()
  flags.FLAGS.mark_as_parsed()
  if rest[1:]:
    raise LoraxError(
      f"unexpected argument {rest[1]!r}: every argument is a flag, --name=value "
      "(--help lists them)"
    )
  return rest


def _message(error: flags.Error) -> str:
  message = str(error).strip().rstrip(".")
  # absl names the flag twice where a validator speaks: keep the sentence.
  return re.sub(r"^flag --\w+=.*?: (?=Flag )", "", message)


def _requests_help(argv: Sequence[str]) -> bool:
  before = argv[: argv.index("--")] if "--" in argv else argv
  return not _HELP.isdisjoint(before[1:])


def _help(
  values: flags.FlagValues,
  argv: Sequence[str],
  more_help: Callable[[Sequence[str]], str] | None,
) -> str:
  about = (sys.modules["__main__"].__doc__ or "").strip()
  text = values.get_help(include_special_flags=False)
  parts = [about, "Flags:", text.strip("\n")]
  if more_help is not None:
    parts.append(more_help(argv))
  return "\n\n".join(part for part in parts if part)
