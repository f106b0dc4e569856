"""Folders that are there complete, or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_flax.errors import LoraxError, listing


@contextmanager
def writing(folder: Path, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
  """A scratch folder that becomes `folder` when the block ends without an error.

  Args:
    folder: where it shall lie; parents are made.
    may_replace: says of a folder that lies there, and isn't empty, whether it may go.

  Raises:
    LoraxError: something else lies there, or the place cannot be written.
  """
  refuse_unless_free(folder, may_replace)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final place, so that placing is a rename within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  except OSError as error:
    raise LoraxError(f"cannot write {folder}: {error.strerror or error}") from error
  try:
    fresh = scratch / "fresh"
    fresh.mkdir()  # with the user's usual permissions, which mkdtemp's has not
    yield fresh
    if folder.exists():
      folder.rename(scratch / "old")
    fresh.rename(folder)
  except OSError as error:
    raise LoraxError(f"cannot write {folder}: {error.strerror or error}") from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def refuse_unless_free(folder: Path, may_replace: Callable[[Path], bool]) -> None:
  """Raises LoraxError where `writing` would; before the work, so that none is lost."""
  if not folder.exists() and not folder.is_symlink():
    return
  if not folder.is_dir():
    raise LoraxError(f"cannot write {folder}: a file lies there")
  inside = [entry.name for entry in folder.iterdir()]
  if inside and not may_replace(folder):
    raise LoraxError(
      f"{folder} exists and is not empty: it holds {listing(inside, most=8)}"
    )
