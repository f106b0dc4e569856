"""--prune: Optuna's decisions, what it refuses, and a sweep that spends less by it."""

import csv
import json
import random

import optuna
import pytest

from experiments.cli import config_flag
from experiments.sweeps import outcomes, plan, pruning, runner
from lorax_flax.errors import LoraxError
from lorax_flax.train.judging import Standing
from tests.train import tiny
from tests.train.stopping import Stopped, Stopping
from tests.train.toy import with_batches

# One worker runs them all: what they share is made once.
pytestmark = []


def _optunas(text, total, curves, direction):
  """The step at which Optuna's own study prunes each of these curves; 0: none."""
  wanted = pruning.read(text)
  judge = pruning.judge(wanted, [], total, "accuracy")
  names = {
    "halving": optuna.pruners.SuccessiveHalvingPruner,
    "median": optuna.pruners.MedianPruner,
  }
  options = {
    "halving": {"min_resource": 4, "reduction_factor": 3},
    "median": {"n_startup_trials": 3, "n_warmup_steps": 6, "interval_steps": 6},
  }[wanted.name]
  pruner = names[wanted.name](**options)
  study = optuna.create_study(direction=direction, pruner=pruner)
  found = []
  for curve in curves:
    trial = study.ask()
    for step in judge.steps:
      trial.report(curve(step), step)
      if trial.should_prune():
        found.append(step)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        break
    else:
      found.append(0)
      study.tell(trial, curve(total))
  return found


@pytest.mark.parametrize("metric", ["accuracy", "eval_loss"])
@pytest.mark.parametrize(
  "text",
  [
    "halving:min_resource=4,reduction_factor=3",
    "median:n_startup_trials=3,n_warmup_steps=6,interval_steps=6",
  ],
)
def test_trials_are_stopped_where_optunas_study_stops_them(text, metric):
  rng, total = random.Random(3), 40
  numbers = [(rng.random(), rng.random()) for _ in range(40)]
  direction, sign = {"accuracy": ("maximize", 1), "eval_loss": ("minimize", -1)}[metric]
  curves = [lambda s, n=n: sign * (n[0] + n[1] * s / 10) for n in numbers]
  judge = pruning.judge(pruning.read(text), [], total, metric)
  standings, found = [], []
  for number, curve in enumerate(curves):
    standings.append(Standing({}))
    for step in judge.steps:
      scores = {**standings[number].scores, step: curve(step)}
      standings[number] = Standing(scores)
      if judge.prunes(standings, number):
        standings[number] = Standing(scores, pruned={"step": step})
        found.append(step)
        break
    else:
      standings[number] = Standing(standings[number].scores, complete=True)
      found.append(0)
  assert found == _optunas(text, total, curves, direction)
  assert len({*found}) > 2


def test_trials_of_earlier_batches_count():
  judge = pruning.judge(pruning.read("halving:min_resource=4"), [], 20, "accuracy")
  own = [Standing({4: 0.5})]
  assert not judge.prunes(own, 0)
  before = [Standing({4: 0.6 + i / 100}, {"step": 4}) for i in range(4)]
  judge = pruning.judge(pruning.read("halving:min_resource=4"), before, 20, "accuracy")
  assert judge.prunes(own, 0)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("halvin", "did you mean 'halving'"),
    ("halving:factor=3", "did you mean 'reduction_factor'"),
    ("halving:reduction_factor=1.5", "a whole number, not '1.5'"),
    ("halving:reduction_factor=1", "reduction_factor >= 2"),
    ("median:interval_steps=0", "interval steps must be at least 1"),
    ("median:examples=0", "examples must be at least 1"),
  ],
)
def test_a_mistake_in_prune_is_named(text, message):
  with pytest.raises(LoraxError, match=message):
    pruning.read(text)


def test_a_trial_too_short_to_be_judged_is_an_error():
  with pytest.raises(
    LoraxError, match=r"12 steps would not be judged .*min_resource=…"
  ):
    pruning.judge(pruning.read("halving:min_resource=12"), [], 12, "accuracy")
  with pytest.raises(LoraxError, match=r"1 steps would not be judged .*n_startup"):
    pruning.judge(pruning.read("median"), [], 1, "accuracy")


def test_without_optuna_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "optuna", None)
  with pytest.raises(LoraxError, match=r"pip install 'lorax-flax\[sweep\]'"):
    pruning.read("median")


SWEEP = """

def sweep(add):
  for rate in (1e-6, 0.02, 1e-5, 0.01, 0.03, 1e-7):
    add(**{"train.learning_rate": rate})
"""
PRUNE = "halving:min_resource=4,reduction_factor=2,examples=16"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  file = tiny.write(tmp_path_factory.mktemp("config"), num_hidden_layers=1)
  file.write_text(file.read_text() + SWEEP)
  return str(file)


@pytest.fixture(scope="module")
def pruned(config, tmp_path_factory):
  """The sweep's folder, and its pages while it ran."""
  folder, pages = tmp_path_factory.mktemp("pruned"), []
  page = runner.sweep_page.page
  with pytest.MonkeyPatch.context() as patch:
    keep = lambda *args: pages.append(page(*args)) or pages[-1]
    patch.setattr(runner.sweep_page, "page", keep)
    found = plan.of(config_flag.choose(config), PRUNE)
    assert runner.run(found, folder, 2, 1, []) == 0
  return folder, pages


def _rows(folder):
  with (folder / "results.csv").open() as file:
    return list(csv.DictReader(file))


def test_the_table_and_the_page_show_who_was_stopped_where_and_why(pruned):
  folder, pages = pruned
  rows = _rows(folder)
  stopped = [row for row in rows if row["status"].startswith("pruned at step")]
  assert len(rows) == 6
  assert {row["status"] for row in rows} - {row["status"] for row in stopped} == {
    "done"
  }
  assert 2 <= len(stopped) <= 4
  assert all("halving stops it at accuracy" in row["reason"] for row in stopped)
  page = (folder / "results.html").read_text()
  assert page == pages[-1]
  assert page.count('<tr class="pruned">') == len(stopped)
  for row in stopped:
    assert row["status"] in page
    own = json.loads((folder / row["trial"] / "judged.json").read_text())
    assert own["pruned"]["step"] == own["scores"][-1][0]
    assert not (folder / row["trial"] / "result.json").exists()
  assert '<tr class="training">' in pages[1]  # It grows while trials run.
  # Scores go down the page.
  order = [page.index(f">{row['trial']}</a>") for row in sorted(rows, key=_score)]
  assert order == sorted(order)


def _score(row):
  return (row["status"] != "done", -float(row["accuracy"] or 0), row["trial"])


def test_a_pruned_sweep_goes_on_where_it_was_killed(pruned, config, tmp_path):
  folder, _ = pruned
  found = plan.of(config_flag.choose(config), PRUNE)
  prepare = runner.experiment.prepare
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      runner.experiment,
      "prepare",
      lambda runs: with_batches(prepare(runs), lambda x: Stopping(x, 15)),
    )
    with pytest.raises(Stopped):
      runner.run(found, tmp_path, 2, 1, [])
  assert runner.run(found, tmp_path, 2, 1, []) == 0
  assert (tmp_path / "results.csv").read_text() == (folder / "results.csv").read_text()
  with pytest.raises(LoraxError, match="another config: prune"):
    runner.run(plan.of(config_flag.choose(config), "median"), tmp_path, 2, 1, [])


def test_one_program_has_all_trials_that_take_turns(config):
  found = plan.of(config_flag.choose(config), PRUNE)
  assert [len(pack.trials) for pack in found.packs(found.listed(), 2)] == [6]
  found = plan.of(config_flag.choose(config))
  assert [len(pack.trials) for pack in found.packs(found.listed(), 2)] == [2, 2, 2]


def test_dropout_by_a_batchs_length_can_not_take_turns(config):
  with pytest.raises(LoraxError, match=r"--prune: trial-000 .*data\.buckets=1"):
    plan.of(config_flag.choose(config, {"data.buckets": "2"}), PRUNE)


def test_a_trial_that_was_stopped_is_known_to_a_search(config):
  made = plan.of(config_flag.choose(config)).listed()
  ended = outcomes.Outcome(made[0], None, None, {"step": 4, "reason": ""}, {4: 0.5})
  assert ended.over
  assert ended.standing == Standing({4: 0.5}, {"step": 4, "reason": ""})
