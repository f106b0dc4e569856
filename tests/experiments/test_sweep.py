"""Sweeps by the real command's parts, on a model as small as can be."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from experiments import run
from experiments.cli import config_flag
from experiments.sweeps import plan, runner, trials
from lorax_flax.distributed import subprocesses
from lorax_flax.errors import LoraxError
from tests.train import tiny

# Four of two rates and seeds, one in which all differs, and one that diverges.
SWEEP = """

def sweep(add):
  for seed in (0, 1):
    for rate in (0.02, 0.005):
      add(**{"train.learning_rate": rate, "seed": seed})
  add(**{"train.learning_rate": 0.01, "seed": 2, "lora.rank": 4, "lora.alpha": 32.0})
  add(**{"train.learning_rate": 1e38, "train.weight_decay": 1.0})
"""


def _sweep(*changes):
  return "\ndef sweep(add):\n" + "\n".join(f"  add(**{own!r})" for own in changes)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("config")
  file = tiny.write(folder, num_hidden_layers=1)
  file.write_text(file.read_text() + SWEEP)
  return file


def _plan(config, text=None, folder=None):
  if text is not None:
    base = config.read_text().removesuffix(SWEEP)
    config = folder / "config.py"
    config.write_text(base + text)
  return plan.of(config_flag.choose(str(config)))


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("swept")
  assert runner.run(_plan(config), folder, 8, 1, []) == 0
  return folder


def _lines(folder):
  return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def _rows(folder):
  with (folder / "results.csv").open() as file:
    return list(csv.DictReader(file))


def _tensors(folder):
  return safetensors.numpy.load_file(folder / "adapter/adapter_model.safetensors")


def _in_this_process(monkeypatch, wanted, folder):
  """What has a process of its own is done here; returns the list of its commands."""
  commands = []

  def here(found, at_once, *, stderr):
    ended = {}
    for name, command in found.items():
      commands.append(command)
      numbers = command[-1].removeprefix("--trials=").split(",")
      try:
        code = runner.train(wanted, folder, [*map(int, numbers)])
        ended[name] = subprocesses.End(code, "")
      except LoraxError as error:
        ended[name] = subprocesses.End(1, str(error))
    return ended

  monkeypatch.setattr(runner.subprocesses, "run", here)
  return commands


def test_a_trial_equals_its_own_separate_run(config, swept, tmp_path):
  found, number = _plan(config).listed(), 4
  assert len(trials.packs(found, 8)) == 1
  ours = swept / found[number].name
  result = run.run(found[number].settings, tmp_path)
  a, b = _lines(tmp_path), _lines(ours)
  assert [line.keys() for line in a] == [line.keys() for line in b]
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose([*x.values()], [*y.values()], atol=1e-5, rtol=1e-5)
  of_sweep = json.loads((ours / "result.json").read_text())
  assert of_sweep.keys() == result.keys()
  for name in ("accuracy", "eval_loss", "best_step", "tokens", "trained_parameters"):
    assert of_sweep[name] == pytest.approx(result[name], abs=1e-5), name
  want, have = _tensors(tmp_path), _tensors(ours)
  assert want.keys() == have.keys()
  for name in want:
    np.testing.assert_allclose(have[name], want[name], atol=1e-5, err_msg=name)
  for name in ("config.json", "adapter/adapter_config.json"):
    assert (tmp_path / name).read_text() == (ours / name).read_text()


def test_a_trial_that_diverges_is_marked_and_stops_no_other(swept):
  rows = _rows(swept)
  assert [row["status"] for row in rows] == ["done"] * 5 + ["failed at step 2"]
  assert "at step 2" in rows[5]["reason"]
  assert not (swept / "trial-005" / "result.json").exists()
  logged = [line["step"] for line in _lines(swept / "trial-005")]
  assert all(step < 2 for step in logged)


def test_the_table_has_each_trial_and_medians_over_seeds(swept):
  rows = _rows(swept)
  assert [row["trial"] for row in rows] == [f"trial-00{i}" for i in range(6)]
  for row in rows[:5]:
    result = json.loads((swept / row["trial"] / "result.json").read_text())
    assert float(row["accuracy"]) == result["accuracy"]
    assert float(row["eval_loss"]) == result["eval_loss"]
  pair = [float(rows[i]["accuracy"]) for i in (0, 2)]  # The same rate, two seeds.
  assert float(rows[0]["median"]) == pytest.approx(np.median(pair))
  assert float(rows[0]["spread"]) == pytest.approx(np.std(pair, ddof=1))
  assert [row["seeds"] for row in rows] == ["2 of 2"] * 4 + ["1 of 1", "0 of 1"]
  page = (swept / "results.html").read_text()
  # Losses, scores, four fields that vary, and the pairs of the first three of them.
  assert page.count("<svg") == 2 + 4 + 3
  for what in ("src=", 'href="http', "<link", "<script"):  # It needs no other file.
    assert what not in page
  best = max(rows[:5], key=lambda row: float(row["accuracy"]))
  name = best["trial"]
  link = f'<a href="{name}/report.html">{name}</a>'
  assert f'<tr class="best"><th scope="row">{link}</th><td>' in page
  assert f'<a href="{name}/config.json">' in page


def test_a_finished_sweep_is_not_run_again(config, swept, capfd):
  before = {p: p.stat().st_mtime_ns for p in swept.glob("trial-*/*")}
  assert runner.run(_plan(config), swept, 8, 1, []) == 0
  assert {p: p.stat().st_mtime_ns for p in swept.glob("trial-*/*")} == before
  assert "Medians over seeds" in capfd.readouterr().out


def test_a_sweep_that_was_killed_goes_on_to_the_same_table(config, swept, tmp_path):
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.sweep"),
      *(f"--config={config}", f"--workdir={tmp_path}"),
    ],
    cwd=tiny.ROOT,
    stdout=subprocess.DEVNULL,
  )
  metrics = tmp_path / "trial-000" / "metrics.jsonl"
  while process.poll() is None:
    if metrics.exists() and metrics.stat().st_size:
      time.sleep(0.2)
      os.kill(process.pid, signal.SIGKILL)
      break
    time.sleep(0.01)
  assert process.wait() == -signal.SIGKILL
  assert not (tmp_path / "results.csv").exists()
  assert runner.run(_plan(config), tmp_path, 8, 1, []) == 0
  assert (tmp_path / "results.csv").read_text() == (swept / "results.csv").read_text()
  assert (tmp_path / "results.html").read_text() == (swept / "results.html").read_text()
  for i in range(5):
    name = f"trial-00{i}/metrics.jsonl"
    assert (tmp_path / name).read_text() == (swept / name).read_text()


def test_a_search_trains_the_trials_that_it_chooses_batch_by_batch(
  config, tmp_path, monkeypatch
):
  text = """
def search(space):
  space.log_uniform("train.learning_rate", 1e-3, 1e-1)
  space.trials(3, at_once=2)
"""
  wanted, folder = _plan(config, text, tmp_path), tmp_path / "search"
  ran = _in_this_process(monkeypatch, wanted, folder)
  assert runner.run(wanted, folder, 8, 1, []) == 0
  assert [command[-1] for command in ran] == ["--trials=0,1", "--trials=2"]
  rows = _rows(folder)
  assert [row["status"] for row in rows] == ["done"] * 3
  assert len({row["train.learning_rate"] for row in rows}) == 3
  # Taken up again, it has nothing left to choose.
  assert runner.run(wanted, folder, 8, 1, []) == 0
  assert len(ran) == 2


def test_what_can_not_train_together_runs_in_processes_of_its_own(
  config, tmp_path, monkeypatch, capfd
):
  text = _sweep(
    {"lora.exclude": "nothing"}, {"data.max_length": 30}, {"train.steps": 1}
  )
  wanted, folder = _plan(config, text, tmp_path), tmp_path / "sweep"
  commands = _in_this_process(monkeypatch, wanted, folder)
  assert runner.run(wanted, folder, 8, 2, ["--config=C"]) == 1
  assert [command[3:] for command in commands] == [
    ["--config=C", f"--workdir={folder}", f"--trials={numbers}"] for numbers in "012"
  ]
  assert [row["status"] for row in _rows(folder)] == ["not run", "not run", "done"]
  assert "trial-001 could not be run: data.max_length is 30" in capfd.readouterr().err


def test_the_command_lists_the_quick_starts_trials():
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.sweep", "--list"),
      *("--config=quickstart.py", "--config.train.steps=30"),
    ],
    cwd=tiny.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert "8 trials in 1 program" in done.stdout
  assert done.stdout.count("trial-00") == 8


def test_another_sweep_in_the_same_folder_is_an_error(config, swept, tmp_path):
  other = _plan(config, SWEEP.replace("0.005", "0.004"), tmp_path)
  with pytest.raises(
    LoraxError, match=r"learning_rate is 0\.005 there and 0\.004 here"
  ):
    runner.run(other, swept, 8, 1, [])
