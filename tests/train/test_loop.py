import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.train import optim
from lorax_flax.train import state as states
from lorax_flax.train.checkpoint import Checkpoints
from lorax_flax.train.logs import history
from tests.train import toy
from tests.train.stopping import Stopped, Stopping

# What the clock or the folder decides.
_VARIES = {"train_seconds", "seconds", "tokens_per_second", "adapter"}


def _result(folder: Path):
  found = json.loads((folder / "result.json").read_text())
  return {name: value for name, value in found.items() if name not in _VARIES}


def _lines(folder: Path):
  return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def _outcome(folder: Path):
  """All of a run that must not depend on whether it was interrupted."""
  return (
    _result(folder),
    (folder / "metrics.jsonl").read_text(),
    (folder / "adapter.json").read_text(),
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
  """A run that nothing interrupted."""
  folder = tmp_path_factory.mktemp("whole")
  toy.fit(toy.job(folder), folder)
  return folder


def test_a_run_writes_all_that_it_promises(whole):
  names = {entry.name for entry in whole.iterdir()}
  assert names == {
    *("adapter.json", "checkpoints", "curves.png", "metrics.jsonl", "report.html"),
    *("result.json", "tensorboard"),
  }
  result = json.loads((whole / "result.json").read_text())
  assert result["examples_evaluated"] == 37
  assert result["trained_parameters"] == 48
  assert result["steps"] == 24
  assert result["train_seconds"] > 0
  lines = _lines(whole)
  assert [line["step"] for line in lines if "train/loss" in line] == [7, 14, 21, 24]
  assert [line["step"] for line in lines if "eval/accuracy" in line] == [8, 16, 24]


def test_the_result_and_the_export_are_the_best_evaluations(whole):
  lines = _lines(whole)
  scores = {x["step"]: x["eval/accuracy"] for x in lines if "eval/accuracy" in x}
  result = _result(whole)
  best = max(scores.values())
  assert result["accuracy"] == best
  assert result["best_step"] == min(s for s, score in scores.items() if score == best)
  assert result["last"]["accuracy"] == scores[24]
  # The toy was chosen so that the two differ; otherwise this test would show little.
  assert result["best_step"] != 24
  checkpoints = Checkpoints(whole / "checkpoints")
  like = _fresh_state()
  state = checkpoints.restore(result["best_step"], like)
  checkpoints.close()
  exported = json.loads((whole / "adapter.json").read_text())
  np.testing.assert_array_equal(
    state.trained["dense/kernel"].a, np.float32(exported["a"])
  )


def test_the_best_and_the_last_checkpoint_are_kept_and_no_other(whole):
  kept = sorted(int(entry.name) for entry in (whole / "checkpoints").iterdir())
  assert kept == [_result(whole)["best_step"], 24]


def _fresh_state():
  job = toy.job()
  optimizer = optim.optimizer(
    lambda step: 0.0, b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.01, grad_clip=1
  )
  return states.create(
    job.model.params, job.runs[0].adapter, optimizer, jax.random.key(0)
  )[0]


@pytest.mark.parametrize("steps", [[13, 9]])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(whole, tmp_path, steps):
  for after in steps:
    job = toy.with_batches(toy.job(tmp_path), lambda x, n=after: Stopping(x, n))
    with pytest.raises(Stopped):
      toy.fit(job, tmp_path)
  toy.fit(toy.job(tmp_path), tmp_path)
  assert _outcome(tmp_path) == _outcome(whole)


def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(whole, tmp_path):
  # A fixed seed chooses the moments; what the process does by then varies, and may.
  moments = random.Random(0)
  program = [sys.executable, "-m", "tests.train.toy", str(tmp_path)]
  kills = 0
  metrics = tmp_path / "metrics.jsonl"
  while True:
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    # After the imports, from the first sign of life on.
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None and kills < 2:
      if metrics.exists() and metrics.stat().st_mtime_ns != before:
        time.sleep(moments.uniform(0.0, 0.8))
        os.kill(process.pid, signal.SIGKILL)
        kills += 1
        break
      time.sleep(0.01)
    if process.wait() == 0:
      break
    assert process.returncode == -signal.SIGKILL
  assert kills
  assert _outcome(tmp_path) == _outcome(whole)


class _Poisoned(Stopping):
  """Batches of which some, by number from 1, make the loss NaN."""

  def __init__(self, batches, which):
    super().__init__(batches, 1000)
    self._which = which

  def __next__(self):
    batch = super().__next__()
    if 1000 - self._left in self._which:
      batch = batch | {"weights": batch["weights"] * np.float32("nan")}
    return batch


def _poisoned(folder, which, config=toy.CONFIG):
  return toy.with_batches(toy.job(folder, config), lambda x: _Poisoned(x, which))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
  with pytest.raises(
    LoraxError, match=r"nan at step 12: .*checkpoint of step 10 is kept"
  ):
    toy.fit(_poisoned(tmp_path, {12}), tmp_path)
  assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} >= {10}
  assert not (tmp_path / "result.json").exists()


SKIPPING = dataclasses.replace(toy.CONFIG, on_nonfinite="skip", log_steps=1)


def test_a_step_that_is_not_finite_is_skipped_where_that_is_asked_for(
  tmp_path, capfd, logs
):
  result = toy.fit(_poisoned(tmp_path, {2, 3, 12}, SKIPPING), tmp_path)
  said = capfd.readouterr().out
  for step in (2, 3, 12):
    assert f"loss is nan at step {step}: the step is skipped" in said
  assert result["skipped_steps"] == 3
  logged = [line["step"] for line in _lines(tmp_path) if "train/loss" in line]
  assert logged == [step for step in range(1, 25) if step not in (2, 3, 12)]
  assert all(np.isfinite(x) for line in _lines(tmp_path) for x in line.values())
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  state = checkpoints.restore(24, _fresh_state())
  [progress] = checkpoints.progress(24)
  checkpoints.close()
  assert int(state.step) == 21  # The steps that were taken.
  assert progress.skipped == 3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trained))


def test_many_skipped_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(history, "_MOST_SKIPPED", 4)
  # Three in a row, and then four.
  with pytest.raises(LoraxError, match=r"4 steps in a row .* nan at step 14: .*kept"):
    toy.fit(_poisoned(tmp_path, {2, 3, 4, 11, 12, 13, 14}, SKIPPING), tmp_path)


def test_a_run_whose_steps_were_all_skipped_does_not_end_well(tmp_path):
  every = _poisoned(tmp_path, range(1, 25), SKIPPING)
  with pytest.raises(LoraxError, match="all 24 steps in a row were not finite and ch"):
    toy.fit(every, tmp_path)
  assert not (tmp_path / "result.json").exists()
  assert not (tmp_path / "adapter.json").exists()


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path):
  job = toy.job(tmp_path)
  [first, *rest] = job.data.evaluation["validation"]
  wrong = first | {"weights": first["weights"] * np.float32("nan")}
  data = dataclasses.replace(job.data, evaluation={"validation": [wrong, *rest]})
  with pytest.raises(LoraxError, match="the loss of validation is nan at step 8: "):
    toy.fit(dataclasses.replace(job, data=data), tmp_path)
  assert not (tmp_path / "result.json").exists()
  assert not (tmp_path / "adapter.json").exists()


# Writers that Orbax gives up report to an event loop that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_what_there_is_and_the_run_goes_on_later(whole, small_disk):
  disk = small_disk("160k")
  with pytest.raises(
    LoraxError, match=r"can't write a checkpoint to .*: No space left"
  ):
    toy.fit(toy.job(disk), disk)
  assert not (disk / "result.json").exists()
  subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
  toy.fit(toy.job(disk), disk)
  assert _outcome(disk) == _outcome(whole)


def test_without_a_terminal_each_update_is_a_line_that_reads_by_itself(
  tmp_path, capfd, logs
):
  toy.fit(toy.job(tmp_path), tmp_path)
  lines = capfd.readouterr().out.splitlines()
  updates = [line for line in lines if line.startswith("step ")]
  assert len(updates) == 4
  for line in updates:
    assert all(
      word in line for word in ("epoch", "loss", "tokens/s", "peak", "left")
    ), line
  assert any(line.startswith("compiled the training step for 8×24") for line in lines)
  assert not any("\x1b" in line for line in lines)
