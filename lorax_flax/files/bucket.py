"""Folders in buckets (gs://…), and their differences from a disk.

An object is written completely or not at all, like a file that is renamed into place;
but objects can't be renamed or appended to: files that grow are kept on the local disk
and copied (`Mirror`), and so are folders that others write (`staging`). A folder exists
as soon as there is an object in it.
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
  """A folder on a disk, or in a bucket for "gs://bucket/…", with `Path`'s methods.

  Raises:
    LoraxError: a bucket of another kind; the extra for buckets is not installed.
  """
  text = str(text)
  if "://" not in text:
    return Path(text).expanduser()
  if not text.startswith(_SCHEME) or text == _SCHEME:
    raise LoraxError(f"{text}: only buckets gs://BUCKET/FOLDER are supported")
  if importlib.util.find_spec("gcsfs") is None:
    raise LoraxError(f"{text} needs the extra gcs: pip install 'lorax-flax[gcs]'")
  # The same client, whether or not TensorFlow is installed.
  os.environ.setdefault("EPATH_USE_TF", "false")
  import fsspec
  from etils import epath

  # A cached listing would miss objects that Orbax or another process writes.
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  return cast(Path, epath.Path(text))


def holds(path: Path) -> bool:
  """True where the path is in a bucket."""
  return str(path).startswith(_SCHEME)


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
  """Turns any error of a bucket into one for the user.

  Raises:
    LoraxError: instead of any other error, if the path is in a bucket.
  """
  try:
    yield
  except LoraxError:
    raise
  except Exception as error:  # of three libraries, each with its own kinds
    if not holds(path):
      raise
    raise LoraxError(
      f"can't reach {path}: {type(error).__name__}: {' '.join(str(error).split())}"
    ) from error


class Mirror:
  """A local folder of files that grow, which `send` copies into a bucket."""

  def __init__(self, target: Path):
    self._target = target
    self._made = tempfile.TemporaryDirectory(prefix="lorax_flax-")
    self.folder = Path(self._made.name)
    self._sent: dict[Path, int] = {}

  def send(self) -> None:
    """Copies the files that have grown since the last call.

    Raises:
      LoraxError: the bucket can't be written.
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
    """Deletes the local folder, with anything that was not sent."""
    self._made.cleanup()


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
  """A folder for writing: `target` itself, or a local one if that is in a bucket.

  A local folder is copied when the block ends without an error.
  """
  if not holds(target):
    yield target
    return
  with contextlib.closing(Mirror(target)) as mirror:
    yield mirror.folder
    mirror.send()
