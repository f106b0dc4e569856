"""Standard input and output, pipes and devices, where a file could be named."""

import os
import re
from pathlib import Path
from typing import IO, Literal

_DESCRIPTOR = re.compile(rf"/dev/fd/(\d+)|/proc/(?:self|{os.getpid()})/fd/(\d+)")
_MOST_LINKS = 40


def opened(file: Path, mode: Literal["rb", "wb"]) -> IO[bytes] | None:
  """A stream of what is no regular file, such as "-", /dev/stdin or a named pipe.

  Standard output that the shell appends to a file is appended to.

  Returns:
    The stream; None for a regular file, a folder, or a name that is free.

  Raises:
    OSError: it can't be opened.
  """
  number = descriptor(file, 0 if mode == "rb" else 1)
  if number is not None:
    return os.fdopen(os.dup(number), mode)
  if not file.exists() or file.is_file() or file.is_dir():
    return None
  return file.open(mode)


def descriptor(file: Path, dash: int) -> int | None:
  """The number of this process's open file that a name stands for, or None.

  Args:
    file: links are followed.
    dash: the number that "-" stands for.
  """
  text = str(file)
  if text == "-":
    return dash
  for _ in range(_MOST_LINKS):
    if found := _DESCRIPTOR.fullmatch(text):
      return int(found[1] or found[2])
    if not os.path.islink(text):
      break
    text = os.path.normpath(os.path.join(os.path.dirname(text), os.readlink(text)))
  return None
