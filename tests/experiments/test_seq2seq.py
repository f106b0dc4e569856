"""Text to text: the real config, shrunk, on random T5s against transformers and PEFT.

The peer reads the same files with its own tokenizer, shifts the labels itself, and
takes the same steps.
"""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import lorax_flax as lx
from experiments import data as show
from experiments import predict, run
from lorax_flax.errors import LoraxError
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.jobs.abstract import abstract
from lorax_flax.models import registry
from tests.experiments import commands, own_text, peers
from tests.train.stopping import interrupt

STEPS, RATE, CLIP, DECAY = 8, 5e-3, 1.0, 0.1
ALPHA = 1.5
VERSIONS = {
  "v1.0": {},
  "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
SIZES = {
  "vocab_size": 24,
  "d_model": 32,
  "d_kv": 8,
  "d_ff": 40,
  "num_layers": 2,
  "num_heads": 4,
  "n_positions": 64,
  "decoder_start_token_id": 1,
  "pad_token_id": 1,
  "eos_token_id": 2,
}
WORDS = [word for word in peers.WORDS.split() if word.isalpha()]


def _save(version, folder):
  config = transformers.T5Config(**SIZES, **VERSIONS[version])
  torch.manual_seed(0)
  model = transformers.T5ForConditionalGeneration(config)
  if version == "v1.1":  # transformers ties them all the same while it makes a model.
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(24, 32))
  model.eval().save_pretrained(folder)
  peers._tokenizer("t5").save_pretrained(folder)
  return model


def _rows(count, seed=0):
  """Words, and the last of them up to three times."""
  rng = np.random.default_rng(seed)
  for number in range(count):
    words = list(rng.choice(WORDS, int(rng.integers(2, 18))))
    yield {
      "article": " ".join(words),
      "completion": " ".join(words[-1:] * (1 + number % 3) * (1 + 5 * (number % 2))),
      "note": "not read",
    }


def _write(folder, count=22):
  return own_text.write(folder, lambda n, seed=0: _rows(n, seed), count, 7)


def _settings(base, data, **changes):
  changes = {
    "data.columns": {"prompt": "article"},
    "data.max_target_length": 16,
    "data.buckets": 1,
    "model.dropout": 0.0,
    "lora.alpha": ALPHA,
    "train.steps": STEPS,
    "train.learning_rate": RATE,
    "train.grad_clip": CLIP,
    "train.weight_decay": DECAY,
    **changes,
  }
  return own_text.shrunk("seq2seq.py", base, data, **changes)


def _peer_rows(tokenizer, file, max_length=64, max_target_length=16):
  """A file as transformers' examples read it."""
  for line in file.read_text().splitlines():
    row = json.loads(line)
    inputs = tokenizer(row["article"], truncation=True, max_length=max_length)
    labels = tokenizer(
      text_target=row["completion"], truncation=True, max_length=max_target_length
    )
    yield inputs["input_ids"], labels["input_ids"]


class Trained:
  """A run that started from PEFT's adapter, with all that the tests look at."""

  def __init__(self, version, folder):
    self.folder, self.base = folder, folder / "base"
    model = _save(version, self.base)
    self.data = _write(folder / "data")
    options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": "all-linear"}
    self.peft = peers.adapt(model, folder / "start", r=3, lora_alpha=ALPHA, **options)
    self.settings = _settings(self.base, self.data, init_adapter=str(folder / "start"))
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
    self.before = _loss(self.peft, self.held_out())
    self.workdir = folder / "run"
    self.result = run.run(self.settings, self.workdir)

  def held_out(self):
    return list(_peer_rows(self.tokenizer, self.data / "validation.jsonl"))

  def lines(self, name):
    text = (self.workdir / "metrics.jsonl").read_text()
    lines = map(json.loads, text.splitlines())
    return {line["step"]: line[name] for line in lines if name in line}

  def in_peft(self):
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(self.base)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # PEFT's, about its own options
      return peft.PeftModel.from_pretrained(base, self.workdir / "adapter").eval()


@pytest.fixture(scope="module", params=VERSIONS)
def trained(request, tmp_path_factory):
  return Trained(request.param, tmp_path_factory.mktemp("seq2seq"))


def _loss(model, rows):
  """Over target tokens, row by row: nothing is padded."""
  total = count = 0.0
  for ids, labels in rows:
    with torch.no_grad():
      loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    total, count = total + float(loss) * len(labels), count + len(labels)
  return total / count


def test_the_loss_falls_and_is_pefts_with_the_adapter_written(trained):
  evaluated = trained.lines("eval/perplexity")
  assert trained.result["perplexity"] == min(evaluated.values())
  assert trained.result["eval_loss"] < 0.95 * trained.before
  assert trained.result["perplexity"] == pytest.approx(
    math.exp(trained.result["eval_loss"])
  )
  model = trained.in_peft()
  assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
  assert _loss(model, trained.held_out()) == pytest.approx(
    trained.result["eval_loss"], rel=1e-5
  )


def _batches(settings, steps=STEPS):
  batches = run.prepare({Path(): settings}).data.batches
  return [next(batches) for _ in range(steps)]


def _peer_loss(model, batch):
  batch = {name: torch.tensor(x).long() for name, x in batch.items()}
  names = ("input_ids", "attention_mask", "labels")
  return model(**{name: batch[name] for name in names}).loss


def test_tokens_are_counted_of_prompts_and_of_completions(trained):
  counted = sum(
    (batch["attention_mask"] == 1).sum() + (batch["labels"] != -100).sum()
    for batch in _batches(trained.settings)
  )
  assert trained.result["tokens"] == counted


def test_eight_steps_equal_transformers_and_peft(trained):
  options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": "all-linear"}
  base = transformers.AutoModelForSeq2SeqLM.from_pretrained(trained.base)
  model = peers.adapt(base, trained.folder / "again", r=3, lora_alpha=ALPHA, **options)
  named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    [p for _, p in named], lr=RATE, eps=trained.settings.train.eps, weight_decay=DECAY
  )
  losses, norms = [], []
  for batch in _batches(trained.settings):
    loss = _peer_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)))
    optimizer.step()
    losses.append(loss.item())
  for name, theirs in (("train/loss", losses), ("train/grad_norm", norms)):
    ours = trained.lines(name)
    np.testing.assert_allclose(
      [ours[i + 1] for i in range(STEPS)], theirs, rtol=1e-5, err_msg=name
    )
  start, ours = (
    safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    for folder in (trained.folder / "start", trained.workdir / "adapter")
  )
  assert trained.result["best_step"] == STEPS
  for name, parameter in named:
    key = name.replace(".default", "")
    theirs = parameter.detach().numpy()
    moved = np.linalg.norm(theirs - start[key])
    assert np.linalg.norm(ours[key] - theirs) < 1e-3 * moved, key


def test_gradients_equal_torchs(trained, tmp_path):
  job = run.prepare({tmp_path: trained.settings})
  batch, adapter = next(job.data.batches), job.runs[0].adapter
  moving, rest = lx.partition(adapter, lx.trainable_mask(adapter))

  def loss(moving):
    outputs = job.model.forward(job.model.params, lx.combine(moving, rest), batch, None)
    losses_B, weights_B = job.objective.loss(outputs, batch), batch["weights"]
    return (losses_B * weights_B).sum() / weights_B.sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(moving)
  loaded = registry.load(trained.base)
  hub_peft.write_adapter(
    tmp_path / "grads",
    lx.combine(grads, rest),
    loaded.keymap,
    trained.settings.lora,
    task_type="SEQ_2_SEQ_LM",
  )
  ours = safetensors.numpy.load_file(tmp_path / "grads/adapter_model.safetensors")
  base = transformers.AutoModelForSeq2SeqLM.from_pretrained(trained.base)
  options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": "all-linear"}
  model = peers.adapt(base, tmp_path / "again", r=3, lora_alpha=ALPHA, **options)
  theirs = _peer_loss(model, batch)
  theirs.backward()
  assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
  named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
  assert len(named) == len(ours)
  largest = max(float(p.grad.abs().max()) for _, p in named)
  for name, parameter in named:
    got, want = ours[name.replace(".default", "")], parameter.grad.numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * largest, err_msg=name)


def test_batches_hold_what_transformers_makes_of_the_file(trained):
  expected = list(_peer_rows(trained.tokenizer, trained.data / "train.jsonl"))
  found = {}
  for batch in _batches(trained.settings, 12):  # two epochs
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    for row in np.flatnonzero(batch["index"] >= 0):
      ids = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
      labels_T = batch["labels"][row]
      labels = labels_T[labels_T != -100].tolist()
      inputs = batch["decoder_input_ids"][row][: len(labels)].tolist()
      assert inputs == [1, *labels[:-1]]
      assert batch["weights"][row] == len(labels)
      found[int(batch["index"][row])] = (ids, labels)
  assert [found[i] for i in range(len(expected))] == expected


def test_rows_are_batched_by_both_lengths(tmp_path):
  _save("v1.0", tmp_path)
  data = _write(tmp_path / "data", 200)
  settings = _settings(tmp_path, data, **{"data.buckets": 2})
  shapes = [
    (batch["input_ids"].shape[1], batch["labels"].shape[1])
    for batch in _batches(settings, 50)
  ]
  assert {short for _, short in shapes} == {8, 16}
  assert len({long for long, _ in shapes}) == 2
  # Two thirds of the completions fit 8 tokens: at random, all four of a batch do in a
  # fifth of the batches.
  assert sum(short == 8 for _, short in shapes) > 20


@pytest.mark.parametrize("trained", ["v1.1"], indirect=True)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(trained, tmp_path):
  interrupt(trained.settings, tmp_path, after=7)
  run.run(trained.settings, tmp_path)
  for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
    assert (tmp_path / name).read_bytes() == (trained.workdir / name).read_bytes()


def test_the_adapter_predicts_through_the_command(trained, tmp_path):
  ids, labels = trained.held_out()[0]
  row = {"input_ids": ids, "decoder_input_ids": [1, *labels[:-1]]}
  (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
  adapter, files = str(trained.workdir / "adapter"), ("in.jsonl", "out.jsonl")
  predict.predict(str(trained.base), adapter, *(str(tmp_path / name) for name in files))
  found = json.loads((tmp_path / "out.jsonl").read_text())["logits"]
  [expected] = peers.logits(trained.in_peft(), [row])
  np.testing.assert_allclose(found, expected[-1], atol=1e-4)


def test_report_and_card_say_how_to_load_it(trained):
  report = (trained.workdir / "report.html").read_text()
  card = (trained.workdir / "adapter/README.md").read_text()
  for text in (report, card):
    assert "AutoModelForSeq2SeqLM" in text
    assert "seq2seq" in text
    assert "perplexity" in text
  assert "pipeline_tag: text2text-generation" in card


def test_two_seeds_train_together_on_batches_of_one_shape(tmp_path):
  _save("v1.0", tmp_path)
  data = _write(tmp_path / "data", 40)
  settings = _settings(tmp_path, data, **{"data.buckets": 2})
  runs = {
    tmp_path / str(seed): dataclasses.replace(
      settings, train=dataclasses.replace(settings.train, seed=seed)
    )
    for seed in (0, 1)
  }
  together = run.prepare(runs).data.batches
  alone = [_batches(each, 6) for each in runs.values()]
  for step in range(6):
    batch = next(together)
    for number in (0, 1):
      own = alone[number][step]
      np.testing.assert_array_equal(batch["index"][number], own["index"])
      width = own["labels"].shape[1]
      np.testing.assert_array_equal(batch["labels"][number][:, :width], own["labels"])


def test_the_step_is_compiled_without_a_checkpoint(tmp_path):
  _save("v1.0", tmp_path)
  settings = _settings(tmp_path, _write(tmp_path / "data"))
  job = abstract(settings, jax.devices()[:1])
  assert job.batch["input_ids"].shape == (4, 64)
  assert job.batch["labels"].shape == (4, 16)
  job.lower()


def test_what_is_read_is_shown_with_the_learnt_tokens_marked(tmp_path):
  _save("v1.0", tmp_path)
  data = _write(tmp_path / "data")
  settings = _settings(
    tmp_path, data, **{"data.max_length": 8, "data.max_target_length": 4}
  )
  shown = "\n".join(show.describe(settings))
  rows = [json.loads(x) for x in (data / "train.jsonl").read_text().splitlines()]
  words = rows[0]["article"].split()[:6]
  for line in (
    "prompts and their completions, of the columns article as prompt, completion; not "
    "read: note",
    "rows: 22 in train, 7 in validation",
    "prompts are cut to data.max_length = 8; ",
    "completions are cut to data.max_target_length = 4; ",
    f"example: <s> {' '.join(words)} </s> -> ⟦<s> {rows[0]['completion']} </s>⟧",
  ):
    assert line in shown
  assert shown.count("example: ") == 3


def test_lorax_data_knows_the_task_by_the_model(tmp_path):
  _save("v1.0", tmp_path)
  file = _write(tmp_path / "data") / "train.jsonl"
  config = json.loads((tmp_path / "config.json").read_text()) | {"n_positions": 128}
  (tmp_path / "config.json").write_text(json.dumps(config))
  done = commands.run(
    *("experiments.cli.main", "data", str(file), f"--config.model.path={tmp_path}"),
    "--config.data.columns.prompt=article",
  )
  assert done.returncode == 0, done.stderr
  assert "⟦<s> " in done.stdout
  assert "completions are padded to " in done.stdout


@pytest.mark.parametrize("ids", ["max_length", "max_target_length"])
def test_long_texts_are_cut_as_transformers_cuts_them(tmp_path, ids):
  _save("v1.0", tmp_path)
  data = _write(tmp_path / "data")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  expected = list(_peer_rows(tokenizer, data / "validation.jsonl", **{ids: 5}))
  job = run.prepare({tmp_path: _settings(tmp_path, data, **{f"data.{ids}": 5})})
  found = {}
  for batch in job.data.evaluation["validation"]:
    for i, row, mask, labels in zip(
      *(batch[n] for n in ("index", "input_ids", "attention_mask", "labels")),
      strict=True,
    ):
      found[int(i)] = (row[mask == 1].tolist(), labels[labels != -100].tolist())
  assert [found[i] for i in range(7)] == expected


def _without(name):
  def change(folder):
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))

  return change


def _no_eos(folder):
  file = folder / "tokenizer.json"
  content = json.loads(file.read_text())
  file.write_text(json.dumps(content | {"post_processor": None}))


@pytest.mark.parametrize(
  ("change", "row", "fields", "message"),
  [
    (None, {"article": "a"}, {}, r"train\.jsonl: line 23 has no completion"),
    (None, {"article": "a", "completion": " "}, {}, "line 23: its completion is empty"),
    (None, {"article": "", "completion": "a"}, {}, "line 23: its prompt is empty"),
    (None, {"article": 3, "completion": "a"}, {}, "line 23: its prompt is no text: 3"),
    (None, None, {"data.path": None}, "data.path: which file of prompts"),
    (None, None, {"data.max_target_length": 1}, "max_target_length must be at least 2"),
    (None, None, {"data.max_target_length": 65}, "max_target_length is 65, and this"),
    (None, None, {"data.max_length": 65}, "data.max_length is 65, and this model"),
    (None, None, {"data.columns": {}}, "data.columns.prompt="),
    (_without("decoder_start_token_id"), None, {}, "no decoder_start_token_id"),
    (_no_eos, None, {}, "ends no text with its eos_token"),
  ],
)
def test_what_can_not_be_is_an_error(tmp_path, change, row, fields, message):
  _save("v1.0", tmp_path)
  data = _write(tmp_path / "data")
  if change:
    change(tmp_path)
  if row:
    with (data / "train.jsonl").open("a") as stream:
      stream.write(json.dumps(row) + "\n")
  with pytest.raises(LoraxError, match=message):
    run.prepare({tmp_path: _settings(tmp_path, data, **fields)})


def test_rows_without_a_text_are_skipped_and_counted(tmp_path):
  _save("v1.0", tmp_path)
  data = _write(tmp_path / "data")
  bad = [
    '{"article": "a"}',
    '{"article": "a", "completion": " "}',
    '{"article": " ", "completion": "a"}',
    '{"article": "", "completion": "a"}',
    "[]",
  ]
  with (data / "train.jsonl").open("a") as stream:
    stream.write("\n".join(bad))
  settings = _settings(tmp_path, data, **{"data.bad_rows": "skip"})
  shown = "\n".join(show.describe(settings))
  for line in (
    "1 rows are skipped: has no completion (the first: line 23)",
    "1 rows are skipped: its completion is empty (the first: line 24)",
    "2 rows are skipped: its prompt is empty (the first: line 25)",
    "1 rows are skipped: is no object: [] (the first: line 27)",
  ):
    assert f"train.jsonl: {line}" in shown


def test_another_kind_of_model_is_refused(tmp_path):
  own_text.decoder(tmp_path)
  settings = _settings(tmp_path, _write(tmp_path / "data"))
  with pytest.raises(LoraxError, match="seq2seq trains a seq2seq-lm model"):
    run.prepare({tmp_path: settings})
