"""Runs whose workdir is in a bucket, and nowhere else."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.train import bucket as buckets_in_use
from lorax_flax.train.loop import fit
from tests.train import buckets, tiny, toy

# What the clock or the folder decides.
_VARIES = {"train_seconds", "seconds", "tokens_per_second", "adapter"}


@pytest.fixture(scope="module")
def bucket():
  with buckets.served() as made:
    yield made


def _start(bucket, *arguments, **options):
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=tiny.ROOT,
    env=os.environ | tiny.QUICK_TO_COMPILE | bucket.environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


def _result(text):
  return {k: v for k, v in json.loads(text).items() if k not in _VARIES}


def test_a_run_killed_and_taken_up_in_a_bucket_is_one_on_a_disk_bit_for_bit(
  bucket, tmp_path
):
  fit(toy.CONFIG, toy.job(), tmp_path)
  first = _start(bucket, "-m", "tests.train.toy", f"gs://{buckets.NAME}/a run")
  until = time.monotonic() + 60
  complete = "a run/checkpoints/10/commit_success.txt"
  while complete not in bucket.names("a run/") and time.monotonic() < until:
    time.sleep(0.02)
  first.send_signal(signal.SIGKILL)
  said, _ = first.communicate(timeout=60)
  assert first.returncode == -signal.SIGKILL, said
  assert "a run/result.json" not in bucket.names()
  assert bucket.read("a run/metrics.jsonl").count(b"\n") > 0

  second = _start(bucket, "-m", "tests.train.toy", f"gs://{buckets.NAME}/a run")
  said, _ = second.communicate(timeout=120)
  assert second.returncode == 0, said
  assert "going on after step" in said
  for name in ("metrics.jsonl", "adapter.json"):
    assert bucket.read(f"a run/{name}") == (tmp_path / name).read_bytes(), name
  result = bucket.read("a run/result.json")
  assert _result(result) == _result((tmp_path / "result.json").read_bytes())
  assert json.loads(result)["adapter"] == f"gs://{buckets.NAME}/a run/adapter.json"
  names = bucket.names("a run/")
  assert bucket.read("a run/curves.png").startswith(b"\x89PNG")
  assert sum("tensorboard/events" in name for name in names) == 2
  assert {n.split("/")[2] for n in names if "/checkpoints/" in n} == {
    p.name for p in (tmp_path / "checkpoints").iterdir()
  }
