import dataclasses
import json

import numpy as np
import pytest

from lorax_flax.data import pipeline
from lorax_flax.errors import LoraxError
from lorax_flax.train import loop, trials
from lorax_flax.train.logs.history import Diverged
from tests.train import toy

FIELDS = ("learning_rate", "seed", "weight_decay", "grad_clip")
# Of each trial, and its rank.
TRIALS = [
  (0.1, 0, 0.01, 1.0, 2),
  (0.02, 1, 0.0, float("inf"), 2),
  (0.05, 0, 0.02, 1e-3, 5),
  (0.1, 1, 0.01, 0.05, 3),
]


def _config(number, **changes):
  own = dict(zip(FIELDS, TRIALS[number][:-1], strict=True))
  return dataclasses.replace(toy.CONFIG, **own, **changes)


def _job(folder, number, name="", buckets=(24,), **changes):
  config = _config(number, **changes)
  return toy.job(folder, config, TRIALS[number][-1], name, buckets)


def _trials(folder, **changes):
  """All trials on one base, in folders of their own."""
  jobs = []
  for i in range(len(TRIALS)):
    own = folder / f"t{i}"
    own.mkdir(exist_ok=True)
    jobs.append(_job(own, i, f"t{i}", **changes))
  runs = [job.runs[0] for job in jobs]
  shape = pipeline.Shape(toy.CONFIG.batch_size, (24,))
  seeds = [run.config.seed for run in runs]
  batches = pipeline.Together(toy.tokens(60, 1), shape, seeds=seeds)
  job = toy.with_batches(jobs[0], lambda _: batches)
  return dataclasses.replace(job, runs=runs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The folders of the trials' separate runs."""
  folders = []
  for i in range(len(TRIALS)):
    folder = tmp_path_factory.mktemp(f"alone{i}")
    toy.fit(_job(folder, i), folder)
    folders.append(folder)
  return folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The trials together, all at once, that nothing interrupted."""
  folder = tmp_path_factory.mktemp("together")
  loop.fit(_trials(folder), folder, width=len(TRIALS))
  return folder


def _lines(folder):
  return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def _exported(folder):
  found = json.loads((folder / "adapter.json").read_text())
  return {name: np.array(value) for name, value in found.items()}


def _check_same(ours, alone):
  a, b = _lines(ours), _lines(alone)
  assert [line.keys() for line in a] == [line.keys() for line in b]
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose([*x.values()], [*y.values()], rtol=1e-6, atol=1e-6)
  a, b = _exported(ours), _exported(alone)
  for name in b:
    assert a[name].shape == b[name].shape
    np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)
  varies = {"train_seconds", "seconds", "tokens_per_second", "adapter"}
  a, b = (json.loads((folder / "result.json").read_text()) for folder in (ours, alone))
  assert a.keys() == b.keys()
  for name in b.keys() - varies:
    assert a[name] == pytest.approx(b[name], abs=1e-6), name


@pytest.mark.parametrize("number", range(len(TRIALS)))
def test_a_trial_is_what_it_is_alone(whole, alone, number):
  _check_same(whole / f"t{number}", alone[number])


def test_one_at_a_time_each_has_its_own_padding(tmp_path):
  """Dropout is drawn for padding too, so that another padding is another mask."""
  buckets, jobs = (12, 24), []
  for i in range(len(TRIALS)):
    (tmp_path / f"t{i}").mkdir()
    jobs.append(_job(tmp_path / f"t{i}", i, f"t{i}", buckets=buckets))
  shape = pipeline.Shape(toy.CONFIG.batch_size, buckets)
  seeds = [job.runs[0].config.seed for job in jobs]
  batches = pipeline.Together(toy.tokens(60, 1), shape, seeds=seeds)
  assert batches.cut.columns == ("input_ids", "attention_mask")
  job = toy.with_batches(jobs[0], lambda _: batches)
  runs = [job.runs[0] for job in jobs]
  together = tmp_path / "together"
  loop.fit(dataclasses.replace(job, runs=runs), together, width=1)
  for i in range(len(TRIALS)):
    folder = tmp_path / f"alone{i}"
    folder.mkdir()
    toy.fit(_job(folder, i, buckets=buckets), folder)
    _check_same(tmp_path / f"t{i}", folder)


def test_they_are_the_same_some_at_a_time(alone, tmp_path):
  # Three, and the one that is left over.
  loop.fit(_trials(tmp_path), tmp_path, width=3)
  for number, folder in enumerate(alone):
    _check_same(tmp_path / f"t{number}", folder)


class _Changed:
  """Stacked batches that make the losses of some trials NaN from a step on; or end."""

  def __init__(self, batches, poison=None, end=10**6):
    self._batches, self._poison, self._end, self._number = batches, poison or {}, end, 0

  def __next__(self):
    self._number += 1
    if self._number > self._end:
      raise _Stopped
    batch = dict(next(self._batches))
    batch["weights"] = batch["weights"].copy()
    for trial, steps in self._poison.items():
      if self._number in steps:
        batch["weights"][trial] = np.nan
    return batch

  def __getattr__(self, name):
    return getattr(self._batches, name)


class _Stopped(Exception):
  pass


def _changed(job, *args, **kwargs):
  return toy.with_batches(job, lambda batches: _Changed(batches, *args, **kwargs))


def test_interrupted_they_end_as_if_nothing_had_happened(whole, tmp_path):
  for end in (13, 9):
    job = _changed(_trials(tmp_path), end=end)
    with pytest.raises(_Stopped):
      loop.fit(job, tmp_path, width=len(TRIALS))
  loop.fit(_trials(tmp_path), tmp_path, width=len(TRIALS))
  for i in range(len(TRIALS)):
    for name in ("metrics.jsonl", "adapter.json"):
      file = f"t{i}/{name}"
      assert (tmp_path / file).read_text() == (whole / file).read_text()
  # Results that were lost are written again.
  (tmp_path / "t1" / "result.json").unlink()
  loop.fit(_trials(tmp_path), tmp_path, width=len(TRIALS))
  assert (tmp_path / "t1" / "result.json").exists()


def test_one_that_diverges_is_frozen_and_stops_no_other(alone, tmp_path, monkeypatch):
  ends, best = [], trials.Program.best
  keep = lambda program, state, *args: ends.append(state) or best(program, state, *args)
  monkeypatch.setattr(trials.Program, "best", keep)
  found = loop.fit(_changed(_trials(tmp_path), {1: {12}}), tmp_path)
  assert isinstance(found[1], Diverged)
  assert found[1].step == 12
  assert not (tmp_path / "t1" / "result.json").exists()
  assert all(line["step"] < 12 for line in _lines(tmp_path / "t1"))
  for number in (0, 2, 3):
    _check_same(tmp_path / f"t{number}", alone[number])
  assert ends[0].each.step.tolist() == [24, 11, 24, 24]
  # It stays so when the run is taken up again.
  again = loop.fit(_trials(tmp_path), tmp_path)
  assert [type(x) for x in again] == [dict, Diverged, dict, dict]


def test_where_all_diverge_the_run_ends(tmp_path):
  poison = {i: {3} for i in range(len(TRIALS))}
  job = _changed(_trials(tmp_path, log_steps=1), poison, end=4)
  found = loop.fit(job, tmp_path)
  assert [x.step for x in found] == [3] * len(TRIALS)


def test_a_step_is_skipped_in_one_trial_alone(alone, tmp_path):
  job = _changed(_trials(tmp_path, on_nonfinite="skip"), {2: {5, 6}})
  found = loop.fit(job, tmp_path)
  assert [result["skipped_steps"] for result in found] == [0, 0, 2, 0]
  _check_same(tmp_path / "t0", alone[0])


def test_what_can_not_train_together_is_an_error(tmp_path):
  job = _trials(tmp_path)
  config = dataclasses.replace(job.runs[1].config, b2=0.99)
  job.runs[1] = dataclasses.replace(job.runs[1], config=config)
  with pytest.raises(LoraxError, match="t1 and t0 can't train together: of train's"):
    loop.fit(job, tmp_path)


def test_ranks_that_differ_can_not_train_together_where_padding_changes_a_step(
  tmp_path,
):
  job = _trials(tmp_path, optimizer="adafactor", b2=0.999, eps=1e-8)
  with pytest.raises(LoraxError, match="ranks differ, and a step of adafactor"):
    loop.fit(job, tmp_path)
