import errno
import json
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_accumulator

from lorax_flax.train.logs import curves
from lorax_flax.train.logs.writer import Record
from tests.experiments import peers

PNG = b"\x89PNG\r\n\x1a\n"


def _lines(folder: Path):
  return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_restored_step_are_dropped(tmp_path):
  record = Record(tmp_path, 0)
  for step in (10, 20, 20, 30):
    record.write(step, step / 20, {"train/loss": 1 / step})
  record.close()
  with (tmp_path / "metrics.jsonl").open("a") as out:
    out.write('{"step": 40, "ep')  # Cut off by a kill.
  again = Record(tmp_path, 20)
  assert [line["step"] for line in again.lines] == [10, 20, 20]
  again.write(30, 1.5, {"train/loss": 0.5})
  again.close()
  assert [line["step"] for line in _lines(tmp_path)] == [10, 20, 20, 30]
  assert _lines(tmp_path)[-1] == {"step": 30, "epoch": 1.5, "train/loss": 0.5}


def test_answers_are_dropped_as_lines_are_and_all_of_them_before_a_checkpoint(tmp_path):
  def answer(step, text="a"):
    return [{"step": step, "prompt": "p", "expected": "e", "answer": text}]

  record = Record(tmp_path, 0)
  assert not (tmp_path / "samples.jsonl").exists()
  for step in (0, 10, 20):
    record.answered(answer(step))
  record.close()
  again = Record(tmp_path, 10)
  again.answered(answer(20, "b"))
  again.close()
  found = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
  assert found == [*answer(0), *answer(10), *answer(20, "b")] == again.samples
  anew = Record(tmp_path, 0)
  assert not anew.samples
  anew.close()


def test_tensorboard_shows_each_value_and_forgets_what_was_undone(tmp_path):
  record = Record(tmp_path, 0)
  record.write(1, 0.1, {"train/loss": 3.0})
  record.write(2, 0.2, {"train/loss": 9.0})
  record.close()
  again = Record(tmp_path, 1)
  again.write(2, 0.2, {"train/loss": 2.0})
  again.events(2, {"speed/tokens_per_second": 100.0})
  again.close()
  events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  found = [(e.step, e.value) for e in events.Scalars("train/loss")]
  assert found == [(1, 3.0), (2, 2.0)]
  assert len(events.Scalars("speed/tokens_per_second")) == 1
  assert not any("tokens_per_second" in name for x in _lines(tmp_path) for name in x)


def test_curves_are_a_picture_even_of_a_run_too_short_for_a_line(tmp_path):
  for lines in (
    [],
    [
      {"step": 1, "epoch": 1.0, "train/loss": 1.0, "train/learning_rate": 0.1},
      {"step": 1, "epoch": 1.0, "eval/accuracy": 0.5, "eval/loss": 0.7},
    ],
  ):
    curves.draw(tmp_path / "curves.png", lines, "toy")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
  assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


class _Full:
  def write(self, text):
    pass

  def flush(self):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
  record = Record(tmp_path, 0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(record, "_out", _Full())
    with pytest.raises(OSError, match="No space left") as error:
      record.write(1, 0.1, {"train/loss": 1.0})
  record.close()
  assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_start_waits_for_nothing_that_the_first_step_does_not_need(tmp_path):
  program = f"""
import os, pathlib, sys
from lorax_flax.jobs import about, build, export, provenance
from tests.train import toy

class Watched:
  steps = 0

  def __init__(self, batches):
    self.batches = batches

  def __getattr__(self, name):
    return getattr(self.batches, name)

  def __next__(self):
    if self.steps:
      slow = {{"matplotlib", "scipy.stats", "sklearn", "tensorboard", "torch"}}
      print(sorted(slow & sys.modules.keys()), flush=True)
      os._exit(0)
    self.steps += 1
    return next(self.batches)

folder = pathlib.Path({str(tmp_path)!r})
toy.fit(toy.with_batches(toy.job(folder), Watched), folder)
"""
  done = peers.python("-c", program)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "[]"
