import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic, strict_json


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
  with atomic.new_folder(folder, overwrite=False) as scratch:
    (scratch / "old").write_text("old")

  def fail():
    with atomic.new_folder(folder, overwrite=True) as scratch:
      (scratch / "new").write_text("half")
      raise KeyError("in the middle")

  with pytest.raises(KeyError):
    fail()
  assert names(tmp_path) == ["out", f"out/{atomic.MANIFEST}", "out/old"]


def test_a_write_replaces_the_whole_folder_only_where_it_may(tmp_path):
  folder = tmp_path / "a/out"
  for content in ("first", "second"):
    with atomic.new_folder(folder, overwrite=True) as scratch:
      (scratch / content).write_text(content)
  assert names(folder.parent) == ["out", f"out/{atomic.MANIFEST}", "out/second"]
  with (
    pytest.raises(LoraxError, match="not empty: it holds second"),
    atomic.new_folder(folder, overwrite=False),
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


def fill(folder, *files, **options):
  with atomic.new_folder(folder, **options) as scratch:
    for file in files:
      (scratch / file).parent.mkdir(exist_ok=True)
      (scratch / file).write_text("ours")


@pytest.mark.parametrize("stranger", ["NOTES.md", "results/eval.csv", "arrays/mine"])
def test_a_folder_that_holds_what_was_not_written_here_is_kept(tmp_path, stranger):
  fill(tmp_path / "out", "arrays/0", overwrite=False)
  (tmp_path / "out" / stranger).parent.mkdir(exist_ok=True)
  (tmp_path / "out" / stranger).write_text("six weeks")
  before = names(tmp_path)
  with pytest.raises(LoraxError, match=f"holds .*{stranger}, not written by this"):
    fill(tmp_path / "out", "arrays/0", overwrite=True)
  assert names(tmp_path) == before


@pytest.mark.parametrize("written", [["README.md", "0"], ["0"]])
def test_a_readme_that_a_person_wrote_or_changed_is_kept(tmp_path, written):
  readme = tmp_path / "out/README.md"
  fill(tmp_path / "out", *written, overwrite=False)
  readme.write_text("my own words")
  for _ in range(2):
    fill(tmp_path / "out", "README.md", "1", overwrite=True)
    assert names(tmp_path / "out") == [atomic.MANIFEST, "1", "README.md"]
    assert readme.read_text() == "my own words"


def test_a_readme_that_was_written_here_is_replaced(tmp_path):
  fill(tmp_path / "out", "README.md", overwrite=False)
  with atomic.new_folder(tmp_path / "out", overwrite=True) as scratch:
    (scratch / "README.md").write_text("the second")
  assert (tmp_path / "out/README.md").read_text() == "the second"
  fill(tmp_path / "out", "0", overwrite=True)
  assert not (tmp_path / "out/README.md").exists()


def test_a_folder_without_a_manifest_is_kept_whatever_its_names(tmp_path):
  (tmp_path / "app").mkdir()
  (tmp_path / "app/config.json").write_text("mine")
  with pytest.raises(LoraxError, match=r"holds config\.json, not written by this"):
    fill(tmp_path / "app", "config.json", overwrite=True)
  assert (tmp_path / "app/config.json").read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(tmp_path, exists):
  (tmp_path / "link").symlink_to(tmp_path / "target")
  (tmp_path / "place").symlink_to(tmp_path / "folder")
  if exists:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
  write(tmp_path / "link", b"new")
  fill(tmp_path / "place", "file", overwrite=False)
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "place").is_symlink()
  assert (tmp_path / "target").read_bytes() == b"new"
  assert (tmp_path / "folder/file").read_text() == "ours"


def test_a_pipe_is_written_to_and_stays(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
    write(pipe, b"through")
    assert reader.communicate(timeout=60)[0] == b"through"
  assert pipe.is_fifo()
  assert names(tmp_path) == ["pipe"]


def test_standard_output_appends_where_the_shell_does(tmp_path):
  link = tmp_path / "link"
  link.symlink_to("/proc/self/fd/1")
  (tmp_path / "log").write_text("before")
  code = "import sys, pathlib; from tests.files.test_atomic import write; "
  code += "[write(pathlib.Path(name), b' after') for name in sys.argv[1:]]"
  names = ("-", "/dev/stdout", "/proc/self/fd/1", str(link))
  with (tmp_path / "log").open("a") as log:
    subprocess.run(
      [sys.executable, "-c", code, *names],
      stdout=log,
      check=True,
      cwd=Path(__file__).parents[2],
    )
  assert (tmp_path / "log").read_text() == "before" + 4 * " after"
  assert link.is_symlink()


def test_json_lines_are_read_from_a_pipe_and_from_a_descriptor(tmp_path):
  line, pipe = b'{"text": "a"}\n', tmp_path / "pipe"
  os.mkfifo(pipe)
  with subprocess.Popen(["tee", pipe], stdin=subprocess.PIPE, stdout=-3) as writer:
    writer.stdin.write(line)
    writer.stdin.close()
    assert list(strict_json.lines(pipe)) == [(1, {"text": "a"})]
  source, sink = os.pipe()
  os.write(sink, line)
  os.close(sink)
  assert list(strict_json.lines(Path(f"/dev/fd/{source}"))) == [(1, {"text": "a"})]
  os.close(source)


def test_a_name_as_long_as_names_may_be_is_written(tmp_path):
  longest = tmp_path / ("x" * 255)
  write(longest, b"new")
  fill(tmp_path / ("y" * 255), "file", overwrite=False)
  assert longest.read_bytes() == b"new"
