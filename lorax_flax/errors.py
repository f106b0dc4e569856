"""The one error that speaks to the user, and the words it is made of."""

import contextlib
import difflib
from collections.abc import Collection, Iterable, Iterator

_LONGEST = 4000  # characters of a message


class LoraxError(ValueError):
  """Bad input, said in one message: the offender, what exists, the nearest name.

  Commands print it without a traceback and exit with a non-zero code.
  """

  def __init__(self, message: str):
    # A damaged file's values are quoted, and may be of any length.
    if len(message) > _LONGEST:
      half = _LONGEST // 2
      message = f"{message[:half]} … {message[-half:]}"
    super().__init__(message)


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
  """The `count` names in `options` that are most like `name`, nearest first."""
  return difflib.get_close_matches(name, list(options), n=count, cutoff=0.4)


def listing(names: Iterable[str], most: int = 20) -> str:
  """Names for a message: sorted, and cut with a count where there are many."""
  names = sorted(names)
  shown = ", ".join(names[:most])
  return shown + (f", … ({len(names) - most} more)" if len(names) > most else "")


def unknown(kind: str, name: str, options: Iterable[str]) -> str:
  """A message for a name that is not there: "unknown KIND 'NAME'; did you mean …"."""
  options = list(options)
  near = nearest(name, options)
  hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
  return f"unknown {kind} {name!r}{hint} There are: {listing(options) or 'none'}"


def check_known(kind: str, name: str, options: Collection[str]) -> None:
  """Raises LoraxError, the message of `unknown`, where a name is no option."""
  if name not in options:
    raise LoraxError(unknown(kind, str(name), options))


@contextlib.contextmanager
def prefixed(prefix: str, *kinds: type[Exception]) -> Iterator[None]:
  """Context whose errors, LoraxErrors and those of `kinds`, become "PREFIX: ERROR"."""
  caught: tuple[type[Exception], ...] = (LoraxError, *kinds)
  try:
    yield
  except caught as error:
    raise LoraxError(f"{prefix}: {error}") from error
