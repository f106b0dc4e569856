import os

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic


def names(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(file, content, error=None):
  with atomic.new_file(file) as stream:
    stream.write(content)
    if error is not None:
      raise error


def test_a_file_appears_complete_with_the_usual_permissions(tmp_path):
  (tmp_path / "usual").write_bytes(b"")
  write(tmp_path / "new", b"first")
  write(tmp_path / "new", b"second")
  assert (tmp_path / "new").read_bytes() == b"second"
  assert names(tmp_path) == ["new", "usual"]
  modes = {(tmp_path / name).stat().st_mode for name in ("new", "usual")}
  assert len(modes) == 1


def test_a_failed_write_leaves_the_old_file_and_no_scratch(tmp_path):
  write(tmp_path / "file", b"old")
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "file", b"half", KeyboardInterrupt())
  assert (tmp_path / "file").read_bytes() == b"old"
  assert names(tmp_path) == ["file"]


def test_an_error_of_the_system_has_the_name_of_the_file(tmp_path):
  full = OSError(28, os.strerror(28))
  with pytest.raises(OSError, match=r"No space left on device: .*/file"):
    write(tmp_path / "file", b"half", full)


def test_a_failed_write_leaves_the_old_folder_and_no_scratch(tmp_path):
  folder = tmp_path / "out"
  folder.mkdir()
  (folder / "old").write_text("old")

  def fail():
    with atomic.new_folder(folder, lambda old: True) as scratch:
      (scratch / "new").write_text("half")
      raise KeyError("in the middle")

  with pytest.raises(KeyError):
    fail()
  assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "old"]


def test_a_write_replaces_the_whole_folder_only_where_it_may(tmp_path):
  folder = tmp_path / "a/out"
  for content in ("first", "second"):
    with atomic.new_folder(folder, lambda old: True) as scratch:
      (scratch / content).write_text(content)
  assert [entry.name for entry in folder.parent.rglob("*")] == ["out", "second"]
  with (
    pytest.raises(LoraxError, match="not empty: it holds second"),
    atomic.new_folder(folder, lambda old: False),
  ):
    pass


def is_complete(folder):
  return (folder / "complete").is_file()


def cache(folder, meanwhile=lambda: None):
  with atomic.cached_folder(folder, is_complete, hint="; try elsewhere") as fresh:
    (fresh / "complete").write_text("ours")
    meanwhile()


def test_a_complete_folder_of_another_process_stays(tmp_path):
  folder = tmp_path / "cached"

  def other():
    folder.mkdir()
    (folder / "complete").write_text("theirs")

  cache(folder, other)
  assert (folder / "complete").read_text() == "theirs"
  cache(folder)
  assert (folder / "complete").read_text() == "theirs"
  assert names(tmp_path) == ["cached", "cached/complete"]


def test_an_incomplete_folder_in_a_cache_is_replaced(tmp_path):
  (tmp_path / "cached").mkdir()
  (tmp_path / "cached/half").write_text("")
  cache(tmp_path / "cached")
  assert names(tmp_path) == ["cached", "cached/complete"]


def test_a_cache_that_cannot_be_written_says_what_else_to_do(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(LoraxError, match=r"cannot write .*; try elsewhere"):
    cache(tmp_path / "file/cached")
