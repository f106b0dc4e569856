"""The file of results that a command writes: a line of JSON for each line read."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic, streams


def target(out: str, source: str) -> Path:
  """The file --out, which is neither a folder nor the input."""
  path = Path(out).expanduser()
  if path.is_dir():
    raise LoraxError(f"--out={out} is a folder; it is to be a file")
  if path.is_file() and Path(source).exists() and path.samefile(source):
    raise LoraxError(f"--out={out} is --input: it would be replaced while it is read")
  return path


def write(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
  """Writes all of the file, or none of it; into a pipe line by line."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic.new_file(path) as stream:
    for result in results:
      stream.write((json.dumps(result, ensure_ascii=False) + "\n").encode())


def report(name: str, out: str, count: int) -> None:
  """Prints where the results are, not among those on standard output."""
  is_output = streams.descriptor(Path(out), dash=1) is not None
  print(
    f"{name}: {out} ({count:,} lines)", file=sys.stderr if is_output else sys.stdout
  )
