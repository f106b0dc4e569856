"""Runs that take turns in the places of one program, and the judge who ends some."""

import dataclasses
import json

import numpy as np
import pytest

from lorax_flax.data import pipeline
from lorax_flax.errors import LoraxError
from lorax_flax.train import judging, loop
from lorax_flax.train.judging import Judge
from lorax_flax.train.logs.history import Diverged
from tests.compiles import counted
from tests.train import toy
from tests.train.stopping import Stopped, Stopping
from tests.train.test_together import _check_same, _exported, _lines

# learning rate, seed, rank.
TRIALS = [(0.1, 0, 2), (0.02, 1, 2), (0.05, 0, 5), (0.1, 1, 3), (0.07, 2, 4)]
PRUNED = {1: 10, 2: 5}  # After how many steps, by number.


def _config(number, **changes):
  rate, seed, _ = TRIALS[number]
  return dataclasses.replace(toy.CONFIG, learning_rate=rate, seed=seed, **changes)


def _judge(total, primary):
  assert (total, primary) == (24, "accuracy")
  ends = lambda standings, i: max(standings[i].scores) == PRUNED.get(i)
  return Judge("a test", (5, 10), 20, ends)


def _job(folder, watch=lambda standings: None, judge=_judge):
  jobs = []
  for i, (_, _, rank) in enumerate(TRIALS):
    own = folder / f"t{i}"
    own.mkdir(exist_ok=True)
    jobs.append(toy.job(own, _config(i), rank, f"t{i}"))
  runs = [job.runs[0] for job in jobs]
  shape = pipeline.Shape(toy.CONFIG.batch_size, (24,))
  seeds = [run.config.seed for run in runs]
  batches = pipeline.Together(toy.tokens(60, 1), shape, seeds=seeds)
  job = toy.with_batches(jobs[0], lambda _: batches)
  return dataclasses.replace(job, runs=runs, places=2, judge=judge, watch=watch)


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
  """The folder of all, the standings that were watched, and the programs by name."""
  folder, seen = tmp_path_factory.mktemp("turns"), []
  with counted() as programs:
    results = loop.fit(_job(folder, seen.append), folder)
  return folder, results, seen, programs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The folders of separate runs: one that came later, and one that was stopped."""
  found = {}
  for i in (1, 3, 4):
    found[i] = tmp_path_factory.mktemp(f"alone{i}")
    toy.fit(toy.job(found[i], _config(i), TRIALS[i][-1]), found[i])
  return found


@pytest.mark.parametrize("number", [3, 4])
def test_a_run_that_takes_anothers_place_is_what_it_is_alone(turns, alone, number):
  folder, results, *_ = turns
  _check_same(folder / f"t{number}", alone[number])
  assert results[number]["steps"] == 24


def test_one_that_is_stopped_is_the_first_part_of_itself_alone(turns, alone):
  folder, results, seen, _ = turns
  assert results[1] is None
  assert not (folder / "t1" / "result.json").exists()
  ours = _lines(folder / "t1")
  theirs = [line for line in _lines(alone[1]) if line["step"] <= 10]
  assert len(ours) == len(theirs) == 2
  for x, y in zip(ours, theirs, strict=True):
    np.testing.assert_allclose([*x.values()], [*y.values()], rtol=1e-6, atol=1e-6)
  assert [*seen[-1][1].scores] == [5, 10]
  assert seen[-1][1].pruned["step"] == 10
  assert "a test stops it at accuracy" in seen[-1][1].pruned["reason"]
  assert "Stopped at step 10" in (folder / "t1" / "report.html").read_text()


def test_whoever_waits_takes_the_next_place_and_all_end(turns):
  _, results, seen, _ = turns
  assert [type(x) for x in results] == [dict, type(None), type(None), dict, dict]
  assert [x.complete for x in seen[-1]] == [True, False, False, True, True]
  started = [[bool(x.scores) for x in found] for found in seen]
  assert started[1] == [True, True, False, False, False]
  assert started[-1] == [True] * 5


def test_a_new_run_in_a_place_compiles_nothing(turns):
  *_, programs = turns
  assert programs.count("jit(step)") == 2  # The training step, and the evaluation.
  assert programs.count("jit(_put)") == 1


@pytest.mark.parametrize("ends", [(7, 16)])
def test_interrupted_they_end_as_if_nothing_had_happened(turns, tmp_path, ends):
  folder, results, seen, _ = turns
  for end in ends:
    job = toy.with_batches(_job(tmp_path), lambda x, n=end: Stopping(x, n))
    with pytest.raises(Stopped):
      loop.fit(job, tmp_path)
  again = []
  found = loop.fit(_job(tmp_path, again.append), tmp_path)
  assert [type(x) for x in found] == [type(x) for x in results]
  assert again[-1] == seen[-1]
  for i in range(len(TRIALS)):
    for name in ("metrics.jsonl", "adapter.json"):
      ours, theirs = (x / f"t{i}" / name for x in (tmp_path, folder))
      assert ours.exists() == theirs.exists()
      assert not ours.exists() or ours.read_text() == theirs.read_text()


def test_one_that_diverges_gives_up_its_place_and_a_lost_result_is_trained_again(
  alone, tmp_path
):
  job = toy.with_batches(_job(tmp_path), lambda x: _Poisoned(x, 3))
  found = loop.fit(job, tmp_path)
  assert isinstance(found[0], Diverged)
  assert found[0].step == 3
  _check_same(tmp_path / "t3", alone[3])
  (tmp_path / "t3" / "result.json").unlink()
  before = _exported(tmp_path / "t3")
  again = loop.fit(_job(tmp_path), tmp_path)
  assert [type(x) for x in again] == [Diverged, type(None), type(None), dict, dict]
  assert json.loads((tmp_path / "t3" / "result.json").read_text())["steps"] == 24
  for name, value in _exported(tmp_path / "t3").items():
    np.testing.assert_allclose(value, before[name], rtol=1e-5, atol=1e-6)


class _Poisoned:
  """Batches that make the loss of the first place NaN at a step."""

  def __init__(self, batches, step):
    self._batches, self._left = batches, step

  def __next__(self):
    batch, self._left = dict(next(self._batches)), self._left - 1
    if not self._left:
      batch["weights"] = batch["weights"].copy()
      batch["weights"][0] = np.nan
    return batch

  def __getattr__(self, name):
    return getattr(self._batches, name)


def test_there_is_nothing_to_judge_by_without_held_out_examples(tmp_path):
  job = _job(tmp_path)
  data = dataclasses.replace(job.data, evaluation={})
  with pytest.raises(LoraxError, match="give the data a validation split"):
    loop.fit(dataclasses.replace(job, data=data), tmp_path)


def test_a_sample_is_of_all_lengths_and_counts_its_examples():
  shape = pipeline.Shape(4, (8, 16, 24))
  batches = pipeline.evaluation(toy.tokens(37, 2), shape)
  found = judging.sample({"validation": batches}, 10)["validation"]
  assert len(found) == 3
  assert found[0]["input_ids"].shape[1] < found[-1]["input_ids"].shape[1]
  index = np.concatenate([batch["index"] for batch in found])
  assert index[index >= 0].tolist() == [*range(int((index >= 0).sum()))]
  everything = judging.sample({"validation": batches}, 1000)["validation"]
  assert sum(int((batch["index"] >= 0).sum()) for batch in everything) == 37
