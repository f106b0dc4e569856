"""A launcher's own arguments, and those that it passes on."""

from collections.abc import Sequence


def split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
  """The arguments before the first `--`, and those after it."""
  if "--" not in argv:
    return argv, ()
  at = list(argv).index("--")
  return argv[:at], argv[at + 1 :]
