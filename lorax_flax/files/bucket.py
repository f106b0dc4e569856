"""Folders in buckets (gs://…), and what a bucket does otherwise than a disk.

An object is written whole or not at all, like a file that is renamed into place; but
nothing can be renamed, and nothing appended to: files that grow are kept here and
copied (`Mirror`), and so are folders that others write (`staging`). A folder is there
as soon as something is in it.
"""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from lorax_flax.errors import LoraxError

_SCHEME = "gs://"


def folder(text: str | Path) -> Path:
  """A folder on a disk or, of "gs://bucket/…", in a bucket, with `Path`'s methods.

  Raises:
    LoraxError: a bucket of another kind; what reads buckets is not installed.
  """
  text = str(text)
  if "://" not in text:
    return Path(text).expanduser()
  if not text.startswith(_SCHEME) or text == _SCHEME:
    raise LoraxError(f"{text}: of buckets, gs://BUCKET/FOLDER is supported")
  if importlib.util.find_spec("gcsfs") is None:
    raise LoraxError(f"{text} wants the extra gcs: pip install 'lorax-flax[gcs]'")
  # One way to buckets, whether or not TensorFlow happens to be installed.
  os.environ.setdefault("EPATH_USE_TF", "false")
  import fsspec
  from etils import epath

  # What Orbax, or another process, writes is to be seen.
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  return cast(Path, epath.Path(text))


def holds(path: Path) -> bool:
  """Whether the path is in a bucket."""
  return str(path).startswith(_SCHEME)


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
  """Of what goes wrong with a bucket, whatever it is, makes an error for the user.

  Raises:
    LoraxError: in the place of any error, where the path is in a bucket.
  """
  try:
    yield
  except LoraxError:
    raise
  except Exception as error:  # Three libraries, each with errors of its own.
    if not holds(path):
      raise
    raise LoraxError(
      f"can't reach {path}: {type(error).__name__}: {' '.join(str(error).split())}"
    ) from error


class Mirror:
  """Files that grow, in a folder here, which `send` copies into a bucket."""

  def __init__(self, target: Path):
    self._target = target
    self._made = tempfile.TemporaryDirectory(prefix="lorax_flax-")
    self.folder = Path(self._made.name)
    self._sent: dict[Path, int] = {}

  def send(self) -> None:
    """Copies what has grown since.

    Raises:
      LoraxError: the bucket does not take it.
    """
    with reaching(self._target):
      for file in sorted(self.folder.rglob("*")):
        if not file.is_file():
          continue
        content = file.read_bytes()
        if self._sent.get(file) != len(content):
          (self._target / file.relative_to(self.folder)).write_bytes(content)
          self._sent[file] = len(content)

  def close(self) -> None:
    """Deletes the folder here; what was not sent is lost."""
    self._made.cleanup()


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
  """Where to write what is to lie in `target`: there, or here where it is a bucket.

  What was written here is in the bucket once the block has ended without an error.
  """
  if not holds(target):
    yield target
    return
  with contextlib.closing(Mirror(target)) as mirror:
    yield mirror.folder
    mirror.send()
