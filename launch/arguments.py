"""A launcher's own arguments, and those that it passes on."""

from collections.abc import Sequence


def split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
  """What stands before the first `--`, and what after it."""
  if "--" not in argv:
    return argv, ()
  at = list(argv).index("--")
  return argv[:at], argv[at + 1 :]
