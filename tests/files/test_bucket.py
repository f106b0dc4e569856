"""Runs whose workdir is in a bucket, and nowhere else."""

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket as places
from lorax_flax.files import workdir
from tests.files import buckets
from tests.train import tiny, toy

# What the clock or the folder decides.
_VARIES = {"train_seconds", "seconds", "tokens_per_second", "adapter"}


@pytest.fixture(scope="module")
def bucket():
  """Found by this process and by those it starts."""
  with buckets.served() as made, pytest.MonkeyPatch.context() as patch:
    for name, value in made.environment.items():
      patch.setenv(name, value)
    yield made


def _start(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=tiny.ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _run(*arguments, **environment):
  process = _start(*arguments, **environment)
  said, _ = process.communicate(timeout=300)
  return process.returncode, said


def _result(text):
  return {k: v for k, v in json.loads(text).items() if k not in _VARIES}


def test_a_run_killed_and_taken_up_in_a_bucket_is_one_on_a_disk_bit_for_bit(
  bucket, tmp_path, caplog
):
  caplog.set_level("INFO", "lorax_flax")
  first = _start("-m", "tests.train.toy", "gs://bucket/a run")
  until = time.monotonic() + 120
  complete = "a run/checkpoints/10/commit_success.txt"
  while complete not in bucket.names("a run/") and time.monotonic() < until:
    time.sleep(0.02)
  first.send_signal(signal.SIGKILL)
  said, _ = first.communicate(timeout=60)
  assert first.returncode == -signal.SIGKILL, said
  assert "a run/result.json" not in bucket.names()
  assert bucket.read("a run/metrics.jsonl").count(b"\n") > 0

  folder = places.folder("gs://bucket/a run")
  toy.fit(toy.job(folder), folder)
  assert "resuming after step" in caplog.text
  toy.fit(toy.job(tmp_path), tmp_path)
  for name in ("metrics.jsonl", "adapter.json"):
    assert bucket.read(f"a run/{name}") == (tmp_path / name).read_bytes(), name
  result = bucket.read("a run/result.json")
  assert _result(result) == _result((tmp_path / "result.json").read_bytes())
  assert json.loads(result)["adapter"] == "gs://bucket/a run/adapter.json"
  names = bucket.names("a run/")
  assert bucket.read("a run/curves.png").startswith(b"\x89PNG")
  assert sum("tensorboard/events" in name for name in names) == 2
  assert {n.split("/")[2] for n in names if "/checkpoints/" in n} == {
    p.name for p in (tmp_path / "checkpoints").iterdir()
  }


def test_processes_share_a_bucket_for_workdir_and_programs_and_one_goes_on(
  bucket, tmp_path
):
  config = tiny.write(tmp_path, num_hidden_layers=1)
  flags = (
    *(f"--config={config}", "--workdir=gs://bucket/shared"),
    "--config.compilation_cache=gs://bucket/compiled",
  )
  code, said = _run(
    *("-m", "launch.local", "--processes=2", "--grace=60", "--"),
    *("-m", "tests.distributed.saboteur", *flags),
    SABOTAGE="1 term 4",
    JAX_ENABLE_COMPILATION_CACHE="true",
  )
  assert code == 143, said
  told = re.search(r"told to stop: saved at step (\d+)", said)
  assert told, said
  assert any(name.startswith("compiled/jit") for name in bucket.names())

  code, said = _run("-m", "experiments.run", *flags)
  assert code == 0, said
  assert f"resuming after step {told[1]} of 12" in said
  assert "gs://bucket/shared/adapter/\n" in said
  assert "Traceback" not in said
  assert "Warning" not in said
  result = json.loads(bucket.read("shared/result.json"))
  assert result["adapter"] == "gs://bucket/shared/adapter"
  assert result["examples_evaluated"] == 21
  tensors = safetensors.numpy.load(
    bucket.read("shared/adapter/adapter_model.safetensors")
  )
  assert result["trained_parameters"] == sum(x.size for x in tensors.values())


class _Breaking:
  """Batches, before one of which the bucket breaks."""

  def __init__(self, batches, bucket, at):
    self._batches, self._bucket, self._left = batches, bucket, at

  def __next__(self):
    self._left -= 1
    if not self._left:
      self._bucket.broken.set()
    return next(self._batches)

  def __getattr__(self, name):
    return getattr(self._batches, name)


# Writers that Orbax gives up report to an event loop that is gone, and hold buffers
# that Python 3.13 warns of when it collects them: here, not at the end of all tests.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bucket_that_takes_nothing_any_more_is_one_error_and_keeps_what_it_has(
  bucket,
):
  folder = places.folder("gs://bucket/lost")
  job = toy.with_batches(toy.job(folder), lambda x: _Breaking(x, bucket, 15))
  try:
    with pytest.raises(LoraxError, match=r"^can't (reach|write).* gs://bucket/lost"):
      toy.fit(job, folder)
  finally:
    bucket.broken.clear()
  kept = re.compile(r"lost/checkpoints/\d+/commit_success.txt")
  assert any(map(kept.fullmatch, bucket.names("lost/")))
  assert toy.fit(toy.job(folder), folder)["steps"] == 24
  gc.collect()


def test_a_bucket_that_takes_nothing_is_one_error_before_anything_is_loaded(bucket):
  folder = places.folder("gs://bucket/no")
  workdir.check_writable(folder)
  assert not bucket.names("no/")
  bucket.broken.set()
  try:
    with pytest.raises(LoraxError, match=r"can't reach gs://bucket/no.*: Forbidden"):
      workdir.check_writable(folder)
  finally:
    bucket.broken.clear()


def test_a_folder_is_local_unless_it_says_otherwise(monkeypatch):
  assert places.folder("~/run") == Path.home() / "run"
  assert str(places.folder("gs://bucket/a/b") / "c") == "gs://bucket/a/b/c"
  assert places.holds(places.folder("gs://bucket/a"))
  assert not places.holds(places.folder("gs/bucket"))
  with pytest.raises(LoraxError, match="s3://b/c: only buckets gs://BUCKET/FOLDER are"):
    places.folder("s3://b/c")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(LoraxError, match=r"pip install 'lorax-flax\[gcs\]'"):
    places.folder("gs://bucket/a")
