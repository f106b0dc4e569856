"""Files and folders that appear complete, or not at all.

They are made under a hidden name beside the final one, in the same file system, and
renamed. Objects in buckets are complete by themselves. Links are followed, and a pipe
or a device is written to: only regular files are ever replaced, and only folders that
hold nothing but what was written here, as their manifest lists it.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import bucket, streams, strict_json

MANIFEST = ".lorax_flax.json"
README = "README.md"
_LONGEST = 40  # characters of a name that its scratch repeats: names have a limit


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[IO[bytes]]:
  """A stream whose content becomes `file` when the block ends without an error.

  A pipe, a device or standard output ("-") has what is written at once.

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
  with naming(file):
    stream = streams.opened(file, "wb")
    if stream is not None:
      with stream:
        yield stream
      return
    file = Path(os.path.realpath(file))
    scratch = file.with_name(f".{file.name[:_LONGEST]}-{secrets.token_hex(4)}")
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
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
  """A scratch folder that becomes `folder` when the block ends without an error.

  A manifest in it lists what was written. A person's README.md is theirs: one that is
  not as it was written here is kept in the place of a new one.

  Args:
    folder: the destination; parents are made, a link is followed.
    overwrite: whether to replace a folder that holds nothing but what its manifest
      lists, and a README.md.

  Raises:
    LoraxError: the destination is taken, or can't be written.
  """
  refuse_unless_free(folder, overwrite=overwrite)
  folder = Path(os.path.realpath(folder))
  in_the_way = _strangers if overwrite else _names
  with _replacing(folder, in_the_way) as fresh:
    yield fresh
    digest = _digest(fresh / README)
    theirs = _digest(folder / README)
    if theirs is not None and theirs != _manifest(folder).get("readme"):
      shutil.copyfile(folder / README, fresh / README)
    about = {"written": sorted(_entries(fresh)), "readme": digest}
    (fresh / MANIFEST).write_text(json.dumps(about, indent=2) + "\n", "utf-8")


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
    in_the_way = lambda old: _names(old) if is_complete(old) else set()
    with _replacing(folder, in_the_way, hint) as fresh:
      yield fresh
  except LoraxError:
    if not is_complete(folder):
      raise


def refuse_unless_free(folder: Path, *, overwrite: bool) -> None:
  """Raises LoraxError where `new_folder` would, before any work is done."""
  _refuse(folder, _strangers if overwrite else _names)


def refuse_inputs(folder: Path, inputs: Iterable[Path]) -> None:
  """Raises LoraxError where replacing `folder` would replace what is read from."""
  for source in inputs:
    if source.resolve().is_relative_to(folder.resolve()):
      raise LoraxError(f"writing {folder} would replace {source}, which is read from")


def _refuse(folder: Path, in_the_way: Callable[[Path], set[str]]) -> None:
  if not folder.exists():
    return
  if not folder.is_dir():
    raise LoraxError(f"cannot write {folder}: it is a file")
  if names := in_the_way(folder):
    whose = ", not written by this program" if in_the_way is _strangers else ""
    raise LoraxError(
      f"{folder} exists and is not empty: it holds {listing(names, most=8)}{whose}. "
      "Move that away, or write to another folder"
    )


def _names(folder: Path) -> set[str]:
  """Names of what is in a folder, the manifest aside."""
  return {entry.name for entry in folder.iterdir()} - {MANIFEST}


def _entries(folder: Path) -> set[str]:
  """Names of all files and folders below, links not followed."""
  entries = {entry.relative_to(folder).as_posix() for entry in folder.rglob("*")}
  return entries - {MANIFEST}


def _strangers(folder: Path) -> set[str]:
  """Entries that the manifest of a folder does not list: all, where there is none."""
  if not (folder / MANIFEST).is_file():
    return _names(folder)
  written = _manifest(folder).get("written")
  return _entries(folder) - {README} - set(written if isinstance(written, list) else ())


def _manifest(folder: Path) -> dict[str, Any]:
  file = folder / MANIFEST
  return strict_json.read_object(file) if file.is_file() else {}


def _digest(file: Path) -> str | None:
  return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


@contextlib.contextmanager
def _replacing(
  folder: Path, in_the_way: Callable[[Path], set[str]], hint: str = ""
) -> Iterator[Path]:
  with contextlib.ExitStack() as stack:
    try:
      folder.parent.mkdir(parents=True, exist_ok=True)
      prefix = f".{folder.name[:_LONGEST]}-"
      scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
      stack.callback(shutil.rmtree, scratch, ignore_errors=True)
      fresh = scratch / "fresh"
      fresh.mkdir()  # with the user's usual permissions, which mkdtemp's has not
      yield fresh
      _refuse(folder, in_the_way)  # Another process may have been first.
      if folder.exists():
        folder.rename(scratch / "old")
      fresh.rename(folder)
    except OSError as error:
      reason = error.strerror or error
      raise LoraxError(f"cannot write {folder}: {reason}{hint}") from error
