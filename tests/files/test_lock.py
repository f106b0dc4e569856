"""A folder's lock: two processes never hold it, and a dead one does not."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket, lock
from tests.files import buckets

_ROOT = Path(__file__).parents[2]
_HOLD = """
import pathlib, sys, time
from lorax_flax.files import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def _elsewhere(folder):
  """A process that holds the folder."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(folder)],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_a_folder_that_a_process_holds_is_refused_until_it_is_killed(tmp_path):
  process = _elsewhere(tmp_path)
  try:
    with (
      pytest.raises(LoraxError, match=f"under way in .*: process {process.pid} on "),
      lock.held(tmp_path),
    ):
      pass
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  with lock.held(tmp_path):
    pass
  assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
  def refuse(*args):
    raise OSError(lock.errno.ENOLCK, "No locks available")

  monkeypatch.setattr(lock.fcntl, "flock", refuse)
  with lock.held(tmp_path):
    pass


@pytest.fixture
def folder(monkeypatch):
  """A folder in a bucket, with a lease that is soon over."""
  with buckets.served() as made:
    for name, value in made.environment.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(lock, "RENEWAL", 0.2)
    monkeypatch.setattr(lock, "EXPIRY", 3.0)
    yield bucket.folder("gs://bucket/run")


def test_in_a_bucket_a_lease_is_refused_while_it_is_renewed(folder):
  with (
    lock.held(folder),
    pytest.raises(LoraxError, match=r"under way in gs://bucket/run: process \d+ on "),
    lock.held(folder),
  ):
    pass
  with lock.held(folder):
    assert (folder / lock.LOCK).exists()
  assert not (folder / lock.LOCK).exists()


def test_in_a_bucket_the_lease_of_a_dead_process_is_taken_over(folder):
  lock._sign(folder / lock.LOCK, "of a dead process", 7)
  with lock.held(folder):
    assert b"dead" not in (folder / lock.LOCK).read_bytes()


def test_in_a_bucket_a_process_that_has_lost_its_lease_ends(folder, monkeypatch):
  ended = threading.Event()
  monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set())
  with lock.held(folder):
    lock._sign(folder / lock.LOCK, "of another process", 0)
    assert ended.wait(10)
  assert b"another" in (folder / lock.LOCK).read_bytes()
