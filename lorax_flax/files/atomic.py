"""Files and folders that appear complete, or not at all.

They are made under a hidden name beside the final one, in the same file system, and
renamed. Objects in buckets are complete by themselves.
"""

import contextlib
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import bucket


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[IO[bytes]]:
  """A stream whose content becomes `file` when the block ends without an error.

  Raises:
    OSError: it can't be written; the error has the file's name.
    LoraxError: the bucket can't be written.
  """
  if bucket.holds(file):
    buffer = io.BytesIO()
    yield buffer
    with bucket.reaching(file):
      file.write_bytes(buffer.getvalue())
    return
  scratch = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
  with naming(file):
    try:
      with scratch.open("xb") as stream:
        yield stream
      os.replace(scratch, file)
    finally:
      scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Adds the path to an OSError that has none, such as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.filename is not None or error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def new_folder(folder: Path, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
  """A scratch folder that becomes `folder` when the block ends without an error.

  Args:
    folder: the destination; parents are made.
    may_replace: whether an existing folder, which isn't empty, may be replaced.

  Raises:
    LoraxError: the destination is taken, or can't be written.
  """
  refuse_unless_free(folder, may_replace)
  with _replacing(folder, may_replace) as fresh:
    yield fresh


@contextlib.contextmanager
def cached_folder(
  folder: Path, is_complete: Callable[[Path], bool], *, hint: str
) -> Iterator[Path]:
  """`new_folder` in a cache, where another process's complete one is as good as ours.

  Args:
    is_complete: whether an existing folder can stay; another is replaced.
    hint: end of the message if the folder can't be written.
  """
  try:
    with _replacing(folder, lambda old: not is_complete(old), hint) as fresh:
      yield fresh
  except LoraxError:
    if not is_complete(folder):
      raise


def refuse_unless_free(folder: Path, may_replace: Callable[[Path], bool]) -> None:
  """Raises LoraxError where `new_folder` would, before any work is done."""
  if not folder.exists() and not folder.is_symlink():
    return
  if not folder.is_dir():
    raise LoraxError(f"cannot write {folder}: it is a file")
  inside = [entry.name for entry in folder.iterdir()]
  if inside and not may_replace(folder):
    raise LoraxError(
      f"{folder} exists and is not empty: it holds {listing(inside, most=8)}"
    )


@contextlib.contextmanager
def _replacing(
  folder: Path, may_replace: Callable[[Path], bool], hint: str = ""
) -> Iterator[Path]:
  with contextlib.ExitStack() as stack:
    try:
      folder.parent.mkdir(parents=True, exist_ok=True)
      scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
      stack.callback(shutil.rmtree, scratch, ignore_errors=True)
      fresh = scratch / "fresh"
      fresh.mkdir()  # with the user's usual permissions, which mkdtemp's has not
      yield fresh
      refuse_unless_free(folder, may_replace)  # Another process may have been first.
      if folder.exists():
        folder.rename(scratch / "old")
      fresh.rename(folder)
    except OSError as error:
      reason = error.strerror or error
      raise LoraxError(f"cannot write {folder}: {reason}{hint}") from error
