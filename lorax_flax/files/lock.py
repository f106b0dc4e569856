"""A folder's lock, which dies with its owner: flock on a disk, a lease in a bucket."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket

log = logging.getLogger(__name__)

LOCK = ".lock"
# Seconds between two signs of life in a bucket, and after how many without one the
# owner counts as dead. Clocks are not compared: whoever waits watches for a change.
RENEWAL = 10.0
EXPIRY = 45.0
# What file systems answer that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
  """Context in which no other process, here or elsewhere, holds the folder.

  Raises:
    LoraxError: another one does; it is named.
    OSError: the folder can't be written.
  """
  with bucket.reaching(folder):
    folder.mkdir(parents=True, exist_ok=True)
  with (_lease if bucket.holds(folder) else _flock)(folder / LOCK):
    yield


def _owner() -> dict[str, str]:
  started = time.strftime("%Y-%m-%d %H:%M:%S")
  return {"host": socket.gethostname(), "pid": str(os.getpid()), "since": started}


def _taken(file: Path, text: str | bytes) -> NoReturn:
  try:
    owner = json.loads(text)
    name = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
  except (ValueError, KeyError, TypeError):
    name = "another process"  # It has not written yet who it is.
  raise LoraxError(
    f"a run is under way in {file.parent}: {name}. Wait for it, end it, or choose "
    "another --workdir"
  )


@contextlib.contextmanager
def _flock(file: Path) -> Iterator[None]:
  with _locked(file) as stream:
    stream.truncate(0)
    stream.write(json.dumps(_owner()).encode())
    stream.flush()
    try:
      yield
    finally:
      file.unlink(missing_ok=True)


def _locked(file: Path) -> IO[bytes]:
  while True:
    stream = file.open("a+b")
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # An owner that ends deletes the file: a lock on a deleted one keeps nobody out.
      if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
        return stream
      stream.close()
    except BlockingIOError:
      with stream:
        stream.seek(0)
        _taken(file, stream.read())
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      log.warning("%s has no locks: run nothing else in it meanwhile", file.parent)
      return stream


@contextlib.contextmanager
def _lease(file: Path) -> Iterator[None]:
  token = secrets.token_hex(8)
  with bucket.reaching(file):
    _wait_until_dead(file)
    _sign(file, token, 0)
  done = threading.Event()
  renewing = threading.Thread(target=_renew, args=(file, token, done), daemon=True)
  renewing.start()
  try:
    yield
  finally:
    done.set()
    renewing.join()
    with contextlib.suppress(Exception):  # Without it the lease expires.
      if token.encode() in file.read_bytes():
        file.unlink()


def _sign(file: Path, token: str, number: int) -> None:
  file.write_bytes(json.dumps({**_owner(), "token": token, "life": number}).encode())


def _wait_until_dead(file: Path) -> None:
  """Raises LoraxError as soon as the owner of a lease, if any, gives a sign of life."""
  if not file.exists():
    return
  first, until = file.read_bytes(), time.monotonic() + EXPIRY
  log.info("waiting up to %.0f s: is the run in %s alive?", EXPIRY, file.parent)
  while time.monotonic() < until:
    time.sleep(min(1.0, RENEWAL))
    if not file.exists():
      return
    if (now := file.read_bytes()) != first:
      _taken(file, now)


def _renew(file: Path, token: str, done: threading.Event) -> None:
  number = 0
  while not done.wait(RENEWAL):
    number += 1
    try:
      if token.encode() not in file.read_bytes():
        break
      _sign(file, token, number)
    except Exception as error:  # of the network: the next time may do
      log.warning("can't renew the lease %s: %s", file, error)
  else:
    return
  # This process was stopped, or cut off, for so long that another one took over.
  print(f"error: another run has taken over {file.parent}", file=sys.stderr, flush=True)
  os._exit(1)
