"""A language model's answers to a few prompts while it trains."""

import json
import os
import subprocess
import sys

import pytest

from experiments import run
from experiments.generate import generate
from lorax_flax.errors import LoraxError
from lorax_flax.serve import sampling
from lorax_flax.serve.settings import Decoding
from tests.experiments import own_text, peers, test_seq2seq
from tests.train.stopping import interrupt

PROMPTS, NEW, STEPS = 2, 6, 10  # 18 rows in batches of 4: evaluated at 5 and at 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A base and chats."""
  made = tmp_path_factory.mktemp("answers")
  own_text.decoder(made / "base", own_text.UNMARKED)
  own_text.write(made / "data", own_text.chats)
  return made


def _settings(folder, **changes):
  values = {"data.prompts": PROMPTS, "data.max_new_tokens": NEW, "train.steps": STEPS}
  return own_text.shrunk(
    "chat.py", folder / "base", folder / "data", **values | changes
  )


@pytest.fixture(scope="module")
def trained(folder):
  """The workdir and the result of a run that answers."""
  workdir = folder / "run"
  return workdir, run.run(_settings(folder), workdir)


def _lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def _generated(folder, adapter, tmp_path):
  """What the command generates after the first turns of the held-out chats."""
  source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  rows = _lines(folder / "data/validation.jsonl")[:PROMPTS]
  lines = [json.dumps({"messages": row["messages"][:1]}) + "\n" for row in rows]
  source.write_text("".join(lines))
  decoding = Decoding(max_new_tokens=NEW)
  generate(str(folder / "base"), adapter, str(source), str(out), decoding)
  return [line["text"] for line in _lines(out)]


def test_answers_are_those_of_the_command_before_training_and_after(
  trained, folder, tmp_path
):
  workdir, result = trained
  lines = _lines(workdir / "samples.jsonl")
  assert [line["step"] for line in lines] == [0, 0, 5, 5, 10, 10]
  answers = {
    step: [x["answer"] for x in lines if x["step"] == step] for step in (0, 10)
  }
  assert answers[0] == _generated(folder, None, tmp_path)
  assert result["best_step"] == 10
  assert answers[10] == _generated(folder, str(workdir / "adapter"), tmp_path)
  assert answers[0] != answers[10]
  # The held-out chats count from three on.
  (_, said), prompt = own_text.counting(30), "<|start|>user\nfour<|end|>"
  assert lines[0]["prompt"].startswith(prompt)
  assert lines[0]["prompt"].endswith("<|start|>assistant\n")
  assert said.startswith(lines[0]["expected"])


def test_a_run_that_answers_has_the_numbers_of_one_that_does_not(
  trained, folder, tmp_path
):
  workdir, result = trained
  silent = run.run(_settings(folder, **{"data.prompts": 0}), tmp_path)
  assert not (tmp_path / "samples.jsonl").exists()
  for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
    assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes()
  assert "answer" in result["seconds"]
  assert "answer" not in silent["seconds"]
  assert "Answers" not in (tmp_path / "report.html").read_text()


def test_a_run_that_was_killed_has_each_answer_once(trained, folder, tmp_path):
  interrupt(_settings(folder), tmp_path, after=7)
  # As if it had come further than the last checkpoint.
  with (tmp_path / "samples.jsonl").open("a") as file:
    file.write('{"step": 9, "prompt": "lost"}\n{"step": 10, "pro')
  run.run(_settings(folder), tmp_path)
  assert (tmp_path / "samples.jsonl").read_bytes() == (
    (trained[0] / "samples.jsonl").read_bytes()
  )


def test_the_report_and_the_log_show_them(trained, folder):
  page = (trained[0] / "report.html").read_text()
  lines = _lines(trained[0] / "samples.jsonl")
  assert "before training" in page
  assert "after step 10" in page
  assert f"<td>{lines[0]['expected']}</td>" in page


def test_nothing_is_compiled_after_the_first_answers(folder):
  job = run.prepare({folder / "unused": _settings(folder)})
  adapter = job.runs[0].adapter
  first = job.samples.answer(job.model.params, adapter)
  size = sampling.advance._cache_size()
  assert job.samples.answer(job.model.params, adapter) == first
  assert sampling.advance._cache_size() == size


def test_several_devices_answer_what_one_does(trained, folder, tmp_path):
  flags = {"model.path": folder / "base", "data.path": folder / "data"}
  settings = _settings(folder)
  for section, names in {
    "data": ("max_length", "buckets", "prompts", "max_new_tokens"),
    "train": ("steps", "batch_size", "eval_batch_size", "learning_rate", "log_steps"),
    "lora": ("rank",),
  }.items():
    for name in names:
      flags[f"{section}.{name}"] = getattr(getattr(settings, section), name)
  flags |= {"train.epochs": "None", "train.warmup_fraction": 0.0}
  flags |= {"mesh.fsdp": 2, "mesh.tensor": 2}
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.run"),
      *("--config=chat.py", f"--workdir={tmp_path}"),
      *(f"--config.{name}={x}" for name, x in flags.items()),
    ],
    env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
    cwd=peers.ROOT,
    capture_output=True,
    encoding="utf-8",
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert _lines(tmp_path / "samples.jsonl") == _lines(trained[0] / "samples.jsonl")


def test_rows_that_are_learnt_throughout_are_answered_from_their_middle(
  folder, tmp_path
):
  data = own_text.write(tmp_path, own_text.documents)
  changes = {"data.documents": "rows", "data.path": str(data)}
  settings = _settings(folder, **changes)
  samples = run.prepare({tmp_path / "unused": settings}).samples
  text = next(own_text.documents(1, 30))["text"]
  start = samples.prompts[0].removeprefix("<|begin|>").strip()
  assert text.startswith(start)
  assert text.startswith(samples.expected[0].strip(), len(start))


def test_a_mistaken_number_is_an_error(folder):
  with pytest.raises(LoraxError, match=r"data\.prompts must be at least 0, not -1"):
    _settings(folder, **{"data.prompts": -1})


def test_runs_that_train_together_answer_as_each_alone(trained, folder, tmp_path):
  values = {"one": {}, "two": {"train.learning_rate": 0.05, "lora.rank": 2}}
  runs = {tmp_path / name: _settings(folder, **own) for name, own in values.items()}
  run.train(runs, tmp_path)
  alone = _lines(trained[0] / "samples.jsonl")
  found = {name: _lines(tmp_path / name / "samples.jsonl") for name in values}
  assert found["one"] == alone
  keys = lambda lines: [(line["step"], line["prompt"]) for line in lines]
  assert keys(found["two"]) == keys(alone)
  assert found["two"] != alone


def test_t5_answers_its_encoders_prompts(tmp_path):
  test_seq2seq._save("v1.1", tmp_path / "base")
  data = test_seq2seq._write(tmp_path / "data")
  changes = {"data.prompts": PROMPTS, "data.max_new_tokens": NEW}
  settings = test_seq2seq._settings(tmp_path / "base", data, **changes)
  job = run.prepare({tmp_path / "unused": settings})
  rows = _lines(data / "validation.jsonl")[:PROMPTS]
  source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text("".join(json.dumps({"prompt": x["article"]}) + "\n" for x in rows))
  decoding = Decoding(max_new_tokens=NEW)
  generate(str(tmp_path / "base"), None, str(source), str(out), decoding)
  found = job.samples.answer(job.model.params, job.runs[0].adapter)
  assert found == [line["text"] for line in _lines(out)]
  for row, prompt, expected in zip(
    rows, job.samples.prompts, job.samples.expected, strict=True
  ):
    assert row["article"] in prompt
    # The tokenizer begins each text with a special token.
    assert expected == " ".join(row["completion"].split()[: NEW - 1])
