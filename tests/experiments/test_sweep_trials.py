"""What a sweep makes of a config, before anything trains: trials, groups, searches."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import config_flag
from experiments.sweeps import outcomes, plan, runner, search, trials
from experiments.sweeps import page as sweep_page
from experiments.sweeps import table as sweep_table
from experiments.sweeps.outcomes import Outcome
from launch import calls, sweep
from lorax_flax.distributed import subprocesses
from lorax_flax.errors import LoraxError
from tests.train import tiny

_BASE = """
from experiments.configs import common


def get_config():
  config = common.base()
  config.train.epochs = 1.0
  config.model.dropout = 0.0
  return config
"""


def _plan(folder, text, overridden=None):
  file = folder / "config.py"
  file.write_text(_BASE + text)
  return plan.of(config_flag.choose(str(file), overridden))


def _sweep(*changes):
  return "\ndef sweep(add):\n" + "\n".join(f"  add(**{own!r})" for own in changes)


def _packs(folder, *changes, most=8):
  found = trials.packs(_plan(folder, _sweep(*changes)).listed(), most)
  return [[trial.number for trial in pack.trials] for pack in found], found


def test_what_is_data_trains_together_and_the_rest_apart(tmp_path):
  numbers, packs = _packs(
    tmp_path,
    {"train.learning_rate": 1e-3, "seed": 1},
    {"lora.targets": "query,value"},
    {"train.weight_decay": 0.1, "train.grad_clip": 0.5, "lora.rank": 4},
    {"train.batch_size": 16},
    {"train.steps": 7},
    {"train.learning_rate": 3e-3, "lora.alpha": 2.0, "lora.use_rslora": True},
  )
  assert numbers == [[0, 2, 5], [1], [3], [4]]
  assert [pack.why for pack in packs] == [
    "",
    "lora.targets ('query', 'value')",
    "train.batch_size 16",
    "train.steps 7, train.epochs None",
  ]


def test_not_too_many_train_at_once(tmp_path):
  numbers, packs = _packs(tmp_path, *({"seed": i} for i in range(5)), most=2)
  assert numbers == [[0, 1], [2, 3], [4]]
  assert packs[2].why == "at most 2 at a time"


def test_dropout_keeps_seeds_apart_where_batches_have_several_lengths(tmp_path):
  # Its draws go by the batch's length, and the order of examples by the seed.
  pair = ({"seed": 0}, {"seed": 1}, {"seed": 1, "train.learning_rate": 0.1})
  drop = [own | {"lora.dropout": 0.1} for own in pair]
  numbers, packs = _packs(tmp_path, *drop)
  assert numbers == [[0], [1, 2]]
  assert "data.buckets=1 is one" in packs[1].why
  assert _packs(tmp_path, *(own | {"data.buckets": 1} for own in drop))[0] == [
    [0, 1, 2]
  ]
  unknown = [own | {"model.dropout": None} for own in pair]
  assert _packs(tmp_path, *unknown)[0] == [[0], [1, 2]]
  assert _packs(tmp_path, *pair)[0] == [[0, 1, 2]]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "neither a function sweep"),
    ("\ndef sweep(add):\n  pass\n", "lists no trial"),
    (_sweep({"seed": 1}, {"seed": 2}, {"seed": 1}), "trials 0 and 2 are the same"),
    (_sweep({}, {"seed": 0}), "trials 0 and 1 are the same"),
    (_sweep({"train.lerning_rate": 1.0}), "did you mean 'train.learning_rate'"),
    (_sweep({"rank": 4}), "did you mean 'lora.rank'"),
    (_sweep({"train": 4}), "config.train is a section"),
    (_sweep({"lora.rank": 1.5}), "trial 0 .*config.lora.rank can't be 1.5"),
    (_sweep({"train.batch_size": -1}), "trial 0 .*must be more than 0"),
    (_sweep({"train.eps": 1e-6}), "train.eps is given for all trials"),
    ("\ndef sweep(add):\n  add(1)\n", "TypeError"),
    ("\ndef search(space):\n  pass\n", "gives no bounds"),
    ("\ndef search(space):\n  space.uniform('seed', 0, 1)\n", "how many"),
    ("\ndef search(space):\n  space.uniform('seed', 1, 0)\n", "between 1.0 and 0.0"),
    ("\ndef search(space):\n  space.log_uniform('seed', 0, 1)\n", "no logarithm"),
    (
      "\ndef search(space):\n  space.integer('lora.rnk', 1, 4)\n  space.trials(2)\n",
      "did you mean 'lora.rank'",
    ),
    (
      _sweep({"seed": 1}) + "\ndef search(space):\n"
      "  space.integer('lora.rank', 1, 4)\n  space.trials(2)\n",
      "both",
    ),
  ],
)
def test_a_mistake_in_a_sweep_is_named(tmp_path, text, message):
  with pytest.raises(LoraxError, match=message):
    _plan(tmp_path, text, {"train.eps": "1e-8"})


SEARCH = """
def search(space):
  space.log_uniform("train.learning_rate", 1e-4, 1e-1)
  space.integer("lora.rank", 2, 16)
  space.choice("lora.alpha", [8.0, 16.0])
  space.trials(11, at_once=4)
"""


def _ended(trial, good=1e-2):
  """As a trial might end: the better, the nearer its learning rate is to 1e-2."""
  rate = trial.changes["train.learning_rate"]
  if rate > 0.05:
    return Outcome(trial, None, {"step": 3, "reason": "loss is nan at step 3"})
  score = 1.0 - abs(rate - good)
  result = {"accuracy": score, "eval_loss": 0.1, "primary_metric": "accuracy"}
  return Outcome(trial, result, None)


def test_a_search_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
  whole = _plan(tmp_path, SEARCH)
  chosen = []
  for folder, interrupted in ((tmp_path / "a", False), (tmp_path / "b", True)):
    folder.mkdir()
    ends = []
    while True:
      known = whole.next(folder, ends)
      if interrupted:  # Of another process; some trials are over, and some are not.
        known = _plan(tmp_path, SEARCH).next(folder, ends)
      if len(known) == len(ends):
        break
      ends = [_ended(trial) for trial in known]
    chosen.append([dict(trial.changes) for trial in known])
    assert len(known) == 11
    assert json.loads((folder / "trials.json").read_text()) == chosen[-1]
  assert chosen[0] == chosen[1]
  assert len({json.dumps(own) for own in chosen[0]}) == 11
  for own in chosen[0]:
    assert 1e-4 <= own["train.learning_rate"] <= 1e-1
    assert own["lora.rank"] in range(2, 17)
    assert own["lora.alpha"] in (8.0, 16.0)


def test_a_search_without_optuna_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "optuna", None)
  with pytest.raises(LoraxError, match=r"pip install 'lorax-flax\[sweep\]'"):
    search.ask(_plan(tmp_path, SEARCH).space, 0, [])


def test_a_metric_that_is_better_when_it_is_small(tmp_path):
  found = _plan(tmp_path, _sweep({"seed": 0}, {"seed": 1}, {"seed": 2})).listed()
  ends = [
    Outcome(trial, {"perplexity": x, "primary_metric": "perplexity"}, None)
    for trial, x in zip(found, (3.0, 2.0, 4.0), strict=True)
  ]
  assert outcomes.best(ends) is ends[1]
  assert sweep_table.best_median(ends).median == 3.0
  page = sweep_page.page(ends, "a < b", tmp_path)
  assert "a &lt; b" in page
  assert '<tr class="best"><th scope="row">trial-001' in page


def test_answers_of_trials_are_side_by_side_by_prompt_and_step(tmp_path):
  found = _plan(tmp_path, _sweep(*({"seed": n} for n in range(10)))).listed()
  ends = outcomes.read(found, tmp_path)
  assert "Answers" not in sweep_page.page(ends, "title", tmp_path)
  # The ninth has got farther than the others, the last has not begun.
  for n, trial in enumerate(found[:9]):
    lines = [
      {
        "step": step,
        "prompt": f"<{p}>",
        "expected": f"e{p}",
        "answer": f"{n}.{p}.{step}",
      }
      for step in ((0, 5, 10) if n == 8 else (0, 5))
      for p in range(2)
    ]
    folder = tmp_path / trial.name
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text)
    result = {"accuracy": n / 10, "primary_metric": "accuracy"}
    ends[n] = Outcome(trial, result, None)
  page = sweep_page.page(ends, "title", tmp_path)
  names = [trial.name for trial in found[8:0:-1]]
  head = "".join(f'<th scope="col">{name}</th>' for name in ("step", *names))
  assert page.count(head) == 2
  cells = lambda p, step: [f"{n}.{p}.{step}" for n in range(8, 0, -1)]
  rows = [
    re.findall(r"<td[^>]*>([^<]*)</td>", line)
    for line in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)
  ]
  for p in range(2):
    assert rows.count(cells(p, 0)) == rows.count(cells(p, 5)) == 1
    assert [f"8.{p}.10", *[""] * 7] in rows
    assert f"&lt;{p}&gt;" in page
  assert "Of the 9 trials that answer, the best 8." in page


def test_an_unfinished_sweep_has_a_table_too(tmp_path):
  found = _plan(tmp_path, _sweep({"seed": 0}, {"seed": 1})).listed()
  ends = outcomes.read(found, tmp_path)
  assert "not run" in sweep_table.to_csv(ends)
  assert "<svg" not in sweep_page.page(ends, "title", tmp_path)


def test_commands_run_some_at_a_time_and_say_whose_line_it_is(capfd):
  program = "import sys; print('out'); print('why', file=sys.stderr); sys.exit({})"
  commands = {
    f"c{code}": [sys.executable, "-c", program.format(code)] for code in (0, 3)
  }
  ended = subprocesses.run(commands, 1, stderr=subprocess.STDOUT)
  assert {name: end.code for name, end in ended.items()} == {"c0": 0, "c3": 3}
  assert ended["c3"].last_line == "why"
  assert capfd.readouterr().out.split() == [
    *("[c0]", "out", "[c0]", "why", "[c3]", "out", "[c3]", "why")
  ]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of that")
def test_commands_end_with_the_process_that_started_them(tmp_path):
  file = tmp_path / "pid"
  inner = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); "
  command = [sys.executable, "-c", inner + "time.sleep(60)"]
  outer = (
    "from lorax_flax.distributed import subprocesses; "
    f"subprocesses.run({{'a': {command!r}}}, 1)"
  )
  parent = subprocess.Popen([sys.executable, "-c", outer], cwd=tiny.ROOT)
  until = time.monotonic() + 30
  while not (file.exists() and file.read_text()) and time.monotonic() < until:
    time.sleep(0.02)
  parent.kill()
  parent.wait()
  child = Path(f"/proc/{file.read_text()}")
  while child.exists() and " Z " not in (child / "stat").read_text():
    assert time.monotonic() < until
    time.sleep(0.02)


def test_each_program_is_handed_to_a_job_of_its_own(tmp_path, monkeypatch):
  found = _plan(
    tmp_path, _sweep({"seed": 0}, {"train.steps": 7}, {"seed": 1}, {"train.steps": 9})
  )
  folder = tmp_path / "sweep"
  done = folder / "trial-003" / "result.json"
  done.parent.mkdir(parents=True)
  done.write_text('{"accuracy": 0.5, "primary_metric": "accuracy"}')
  scripts, code = [], 3

  def submit(engine, command, options):
    scripts.append(calls.script(engine.render(command, options)))
    return code

  monkeypatch.setattr(sweep.cluster, "submit", submit)
  launcher = ["slurm", "--name=try", "--nodes=2", "--python=python3"]
  launcher += ["--extra=--qos=a b"]
  # What a cluster does not take is submitted again, and what it does is not.
  assert sweep.run(found, folder, 8, launcher, ["--config=C"]) == 3
  scripts, code = [], 0
  assert sweep.run(found, folder, 8, launcher, ["--config=C"]) == 0
  assert sweep.run(found, folder, 8, launcher, ["--config=C"]) == 0
  for script, number, numbers in zip(
    scripts, ("000", "001"), ("0,2", "1"), strict=True
  ):
    assert f"--job-name=try-{number} --nodes=2" in script
    assert "'--qos=a b'" in script
    assert (
      "python3 -m experiments.sweep --config=C "
      f"--workdir={folder} --trials={numbers} --distributed\n" in script
    )
  assert runner.table(found, folder) == 0
  assert (folder / "results.csv").read_text().count("not run") == 3


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("slrum --nodes=2", "did you mean 'slurm'"),
    ("slurm --nodes=0", "at least 1"),
    ("", "which launcher.*there are gcloud, sky, slurm, xpk"),
  ],
)
def test_a_mistake_in_launch_is_named(tmp_path, text, message):
  found = _plan(tmp_path, _sweep({"seed": 0}))
  with pytest.raises(LoraxError, match=message):
    sweep.run(found, tmp_path / "sweep", 8, text.split(), [])


def test_a_search_is_not_launched(tmp_path):
  with pytest.raises(LoraxError, match="does not wait"):
    sweep.run(_plan(tmp_path, SEARCH), tmp_path / "sweep", 8, ["slurm"], [])


def test_there_is_no_table_of_nothing(tmp_path):
  found = _plan(tmp_path, _sweep({"seed": 0}))
  with pytest.raises(LoraxError, match=r"no trial in .* is over yet"):
    runner.table(found, tmp_path / "sweep")


def test_ranks_train_apart_where_padding_would_change_a_step(tmp_path):
  ranks = [{"lora.rank": rank, "seed": i} for i, rank in enumerate((2, 4, 2))]
  assert _packs(tmp_path, *ranks)[0] == [[0, 1, 2]]
  muon = [own | {"train.optimizer": "muon"} for own in ranks]
  assert _packs(tmp_path, *muon)[0] == [[0, 2], [1]]
