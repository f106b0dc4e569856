"""A user's own files through the commands: trained, shown, predicted from."""

import csv
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from experiments import data, predict, run
from experiments.cli import config_flag
from lorax_flax.data.own.splits import read_splits
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.abstract import abstract
from tests.experiments import commands, peers

WORDS = [word for word in peers.WORDS.split() if word.isalpha() and word != "cat"]
STEPS = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  peers.tiny("bert", folder, head=False)
  return folder


def _texts(count, seed=0):
  """Texts, and whether each names a cat."""
  rng = np.random.default_rng(seed)
  for number in range(count):
    words = list(rng.choice(WORDS, int(rng.integers(2, 9))))
    if number % 3 == 0:
      words[int(rng.integers(len(words)))] = "cat"
    yield " ".join(words), "cat" in words


def _csv(file, label, count=90):
  with file.open("w", newline="", encoding="utf-8-sig") as stream:
    writer = csv.writer(stream)
    writer.writerow(["id", "Review", "sentiment"])
    for number, (text, cat) in enumerate(_texts(count)):
      writer.writerow([number, text, label(cat, number)])
  return file


def _flags(base, file, **changes):
  fields = {
    "model.path": base,
    "data.path": file,
    "data.columns.text": "Review",
    "data.columns.label": "sentiment",
    "data.held_out": 0.2,
    "data.buckets": 1,
    "data.max_length": 16,
    "lora.rank": 2,
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.learning_rate": 0.02,
    **changes,
  }
  return {name: str(value) for name, value in fields.items()}


def _settings(base, file, **changes):
  return config_flag.choose("classify.py", _flags(base, file, **changes)).settings()


def _predicted(base, workdir, folder, texts):
  lines = folder / "in.jsonl"
  lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  predict.predict(
    str(base), str(workdir / "adapter"), str(lines), str(folder / "out.jsonl")
  )
  return list(map(json.loads, (folder / "out.jsonl").read_text().splitlines()))


def test_a_csv_with_two_odd_columns_trains_from_one_command(base, tmp_path):
  file = _csv(tmp_path / "my.csv", lambda cat, _: "cat" if cat else "no cat")
  flags = [f"--config.{name}={x}" for name, x in _flags(base, file).items()]
  done = commands.run(
    *("experiments.run", "--config=classify.py", f"--workdir={tmp_path / 'run'}"),
    *flags,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "run/result.json").read_text())
  assert result["accuracy"] > 0.7
  assert result["primary_metric"] == "accuracy"
  rows = np.array(result["report"]["confusion"]["rows"])
  assert result["report"]["confusion"]["labels"] == ["cat", "no cat"]
  assert rows.sum() == result["examples_evaluated"]
  assert np.trace(rows) / rows.sum() == pytest.approx(result["accuracy"])
  assert result["macro_f1"] == result["report"]["macro_f1"]
  assert (tmp_path / "run/confusion.png").is_file()
  assert json.loads((tmp_path / "run/adapter/labels.json").read_text()) == [
    "cat",
    "no cat",
  ]
  shown = done.stdout + done.stderr
  assert "Review as text, sentiment as label; not read: id" in shown
  assert "labels: 2 classes" in shown
  assert "example: <s> " in shown
  [line] = _predicted(base, tmp_path / "run", tmp_path, ["a cat"])
  assert line["label"] in ("cat", "no cat")


def test_numbers_are_regressed(base, tmp_path):
  file = _csv(tmp_path / "my.csv", lambda cat, number: 1.5 if cat else -0.5)
  result = run.run(_settings(base, file), tmp_path / "run")
  assert result["primary_metric"] == "eval_loss"
  assert result["eval_loss"] < 1.0
  assert result["pearson"] > 0.3
  assert "report" not in result
  [line] = _predicted(base, tmp_path / "run", tmp_path, ["a cat"])
  assert set(line) == {"logits"}
  assert len(line["logits"]) == 1


def test_several_classes_are_learnt_at_once_with_torchs_loss(base, tmp_path):
  names = lambda cat, n: ", ".join(["cat"] * cat + ["even"] * (n % 2 == 0))
  file = _csv(tmp_path / "my.csv", names)
  settings = _settings(base, file, **{"data.labels": "several"})
  result = run.run(settings, tmp_path / "run")
  assert result["primary_metric"] == "micro_f1"
  assert 0.0 < result["exact_match"] <= 1.0
  assert set(result["report"]["classes"]) == {"cat", "even"}
  # transformers' own loss of the rows held out, with the adapter merged.
  rows = [row.values for row in read_splits(str(file), 0.2)["validation"].rows]
  texts = [row["Review"] for row in rows]
  labels = [[float(n in row["sentiment"]) for n in ("cat", "even")] for row in rows]
  lines = _predicted(base, tmp_path / "run", tmp_path, texts)
  loss = torch.nn.BCEWithLogitsLoss()(
    torch.tensor([line["logits"] for line in lines]), torch.tensor(labels)
  )
  assert result["eval_loss"] == pytest.approx(float(loss), rel=1e-4)
  # Each class has a probability of its own.
  assert set(lines[0]["scores"]) == {"cat", "even"}
  assert lines[0]["scores"]["cat"] == pytest.approx(
    float(torch.sigmoid(torch.tensor(lines[0]["logits"][0])))
  )


def test_a_full_model_says_that_it_has_several_classes(base, tmp_path):
  file = _csv(tmp_path / "my.csv", lambda cat, n: "x,y" if cat else "x")
  fields = _flags(base, file, **{"data.labels": "several", "train.steps": 2})
  settings = config_flag.choose("classify.py:full", fields).settings()
  run.run(settings, tmp_path / "run")
  config = transformers.AutoConfig.from_pretrained(tmp_path / "run/model")
  assert config.problem_type == "multi_label_classification"
  assert config.id2label == {0: "x", 1: "y"}


def test_the_dry_run_has_as_many_outputs_as_the_data_has_classes(base, tmp_path):
  file = _csv(tmp_path / "my.csv", lambda _, number: number % 5)
  found = abstract(_settings(base, file), jax.devices()[:1])
  assert found.model.config.num_labels == 5
  assert found.batch["labels"].shape == (8,)
  found.lower()


def test_lorax_data_shows_the_file_alone(base, tmp_path, capsys):
  file = _csv(tmp_path / "my.csv", lambda cat, _: "cat" if cat else "no cat")
  flags = _flags(base, file, **{"data.max_length": 6})
  given = [f"--config.{n}={x}" for n, x in flags.items() if n != "data.path"]
  argv = data.arguments(["data", str(file), *given])
  assert argv[1] == f"--config.data.path={file}"
  done = commands.run("experiments.cli.main", "data", str(file), *given)
  assert done.returncode == 0, done.stderr
  assert f"{file}: texts with labels" in done.stdout
  assert "rows are cut to data.max_length = 6; " in done.stdout
  lines = [x for x in done.stdout.splitlines() if x.startswith("example: ")]
  assert len(lines) == 3
  rows = read_splits(str(file), 0.2)["train"].rows
  for line, row in zip(lines, rows, strict=False):
    words, label = row.values["Review"].split()[:4], row.values["sentiment"]
    assert line == f"example: <s> {' '.join(words)} </s> -> {label}"


@pytest.mark.parametrize(
  ("kind", "label", "bad", "why"),
  [
    (None, lambda cat, _: "cat" if cat else "dog", "", "has no label: it is empty"),
    ("several", lambda cat, _: "cat" if cat else "dog", "a,,b", "has no label: it is"),
    ("number", lambda cat, i: i + cat, "many", "the label 'many' is no number"),
    (None, lambda cat, i: i / 8 + cat, "inf", "the label 'inf' is no finite number"),
  ],
)
def test_rows_without_text_or_label_are_skipped_and_counted(
  base, tmp_path, kind, label, bad, why
):
  file = _csv(tmp_path / "my.csv", label)
  with file.open("a", newline="") as stream:
    csv.writer(stream).writerows([(0, "the cat", bad), (0, " ", label(1, 1)), (1, 2)])
  fields = {"data.labels": kind} if kind else {}
  with pytest.raises(LoraxError, match=r"my\.csv: line 94 has 2 values"):
    data.describe(_settings(base, file, **fields))
  settings = _settings(base, file, **fields, **{"data.bad_rows": "skip"})
  shown = data.describe(settings)
  skipped = [line for line in shown if " rows are skipped: " in line]
  assert len(skipped) == 3
  for line in (f"{why}", "its text is empty (the first: line 93)", "has 2 values"):
    assert any(f"my.csv: 1 rows are skipped: {line}" in found for found in skipped)


def test_a_file_without_a_row_of_use_is_an_error(base, tmp_path):
  file = _csv(tmp_path / "my.csv", lambda cat, _: "")
  with pytest.raises(LoraxError, match=r"my\.csv: no row is of use: line 2: has no"):
    data.describe(_settings(base, file, **{"data.bad_rows": "skip"}))


@pytest.mark.parametrize(
  ("argv", "index"),
  [
    (["data", "--config", "classify.py", "F"], 3),
    (["data", "--config.seed=1", "F"], 2),
    (["data", "F", "--config=classify.py"], 1),
  ],
)
def test_the_file_is_the_one_argument_that_is_no_flag(argv, index):
  changed = list(argv)
  changed[index] = "--config.data.path=F"
  assert data.arguments(argv) == changed


def test_what_has_nothing_of_the_users_can_not_be_shown():
  settings = config_flag.choose("quickstart.py").settings()
  with pytest.raises(LoraxError, match="headlines reads no file"):
    data.describe(settings)
