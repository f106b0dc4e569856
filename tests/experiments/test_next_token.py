"""Runs of next-token training: the real configs, shrunk, against transformers and PEFT.

One run a family starts from a PEFT adapter; torch then takes the same steps.
"""

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

from experiments import run
from lorax_flax.errors import LoraxError
from lorax_flax.train import loop
from tests.experiments import peers
from tests.experiments.token_ids import (
  CLIP,
  DECAY,
  RATE,
  SMOOTHING,
  STEPS,
  rows,
  shrunk,
  write,
)
from tests.train.stopping import interrupt

# Of each family: the config that is shrunk, and what PEFT adapts.
FAMILIES = {
  "llama": ("llama3_8b_instruct.py", {"target_modules": "all-linear"}),
  "gpt2": ("gpt3_175b.py", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


class Trained:
  """A run that started from PEFT's adapter, with all that the tests look at."""

  def __init__(self, family, folder):
    spec, targets = FAMILIES[family]
    self.base = peers.tiny(family, folder / "base")
    self.data = write(folder / "data", rows(22, 0), rows(9, 1))
    options = {"r": 3, "lora_alpha": 6, "modules_to_save": None, **targets}
    self.peft = peers.adapt(self.base, folder / "start", **options)
    self.before = _perplexity(self.peft, self.data)
    self.wanted = shrunk(
      spec,
      folder / "base",
      self.data,
      **{"init_adapter": str(folder / "start"), "lora.alpha": 6.0},
    )
    self.workdir = folder / "run"
    self.result = run.run(self.wanted, self.workdir)
    self.folder = folder

  def lines(self, name):
    text = (self.workdir / "metrics.jsonl").read_text()
    lines = map(json.loads, text.splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
  return Trained(request.param, tmp_path_factory.mktemp(request.param))


def _perplexity(model, data):
  """Over the learnt tokens of a split, row by row: nothing is padded."""
  total = count = 0.0
  for line in (data / "validation.jsonl").read_text().splitlines():
    row = json.loads(line)
    ids = torch.tensor([row["input_ids"]])
    learnt = torch.tensor(row.get("loss_mask", [1] * ids.shape[1]))[1:] == 1
    with torch.no_grad():
      logits = model(input_ids=ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    total, count = total + float(losses[learnt].sum()), count + float(learnt.sum())
  return math.exp(total / count)


def _loaded(trained):
  base = transformers.AutoModelForCausalLM.from_pretrained(trained.folder / "base")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's, about its own options
    return peft.PeftModel.from_pretrained(base, trained.workdir / "adapter").eval()


def test_the_loss_falls_and_the_best_perplexity_is_the_result(trained):
  evaluated = trained.lines("eval/perplexity")
  assert len(evaluated) > 1
  assert trained.result["perplexity"] == min(evaluated.values())
  assert trained.result["perplexity"] < 0.8 * trained.before
  assert trained.result["primary_metric"] == "perplexity"
  assert trained.result["perplexity"] == pytest.approx(
    math.exp(trained.result["eval_loss"])
  )
  assert trained.result["examples_evaluated"] == 9


def test_the_adapter_written_has_that_perplexity_in_peft(trained):
  model = _loaded(trained)
  assert model.peft_config["default"].task_type == "CAUSAL_LM"
  assert _perplexity(model, trained.data) == pytest.approx(
    trained.result["perplexity"], rel=1e-5
  )
  tensors = safetensors.numpy.load_file(
    trained.workdir / "adapter/adapter_model.safetensors"
  )
  assert trained.result["trained_parameters"] == sum(x.size for x in tensors.values())


def _prepare(settings):
  return run.prepare({Path(): settings})


def test_every_step_equals_torch_and_peft(trained):
  batches = _prepare(trained.wanted).data.batches
  model = trained.peft
  named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    [p for _, p in named], lr=RATE, eps=1e-8, weight_decay=DECAY
  )
  linear = trained.wanted.train.schedule == "linear"
  schedule = transformers.get_scheduler(
    "linear" if linear else "constant", optimizer, 0, STEPS
  )
  losses = []
  for _ in range(STEPS):
    batch = {n: torch.tensor(x).long() for n, x in next(batches).items()}
    logits = model(
      input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    loss = torch.nn.functional.cross_entropy(
      logits[:, :-1].flatten(0, 1),
      batch["labels"][:, 1:].flatten(),
      label_smoothing=SMOOTHING,
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
  got = trained.lines("train/loss")
  np.testing.assert_allclose([got[i + 1] for i in range(STEPS)], losses, rtol=1e-4)
  assert trained.result["best_step"] == STEPS
  start, ours = (
    safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    for folder in (trained.folder / "start", trained.workdir / "adapter")
  )
  for name, parameter in named:
    key = name.replace(".default", "")
    theirs = parameter.detach().numpy()
    moved = np.linalg.norm(theirs - start[key])
    # Relative to the way it went, not to where it is.
    assert np.linalg.norm(ours[key] - theirs) < 3e-3 * moved, key


@pytest.mark.parametrize("trained", ["gpt2"], indirect=True)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(trained, tmp_path):
  interrupt(trained.wanted, tmp_path, after=7)
  result = run.run(trained.wanted, tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == (
    trained.workdir / "metrics.jsonl"
  ).read_text()
  for name in ("perplexity", "best_step", "last", "tokens", "trained_parameters"):
    assert result[name] == trained.result[name], name
  weights = "adapter/adapter_model.safetensors"
  assert (tmp_path / weights).read_bytes() == (trained.workdir / weights).read_bytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  peers.tiny("gpt2", folder)
  return folder


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.path": None}, "data.path: which file, or folder with train and val"),
    ({"data.path": "EMPTY"}, "has no train file of .*there is: nothing"),
    ({"data.max_length": 23}, "this model takes at most 22 tokens"),
    ({"model.path": "BERT"}, "trains a causal-lm model, and a bert is a sequence-cl"),
    ({"data.task": "sst2", "data.path": None}, "and a gpt2 is a causal-lm model"),
    ({"data.task": "sst2"}, "data.path is of no use to the task sst2"),
    ({"data.glue_dir": "there"}, "data.glue_dir is of no use to the task next_token"),
    ({"lora.tuned": ("classifier",)}, "'classifier' matches nothing"),
    (
      {"model.hf_config": {"model_type": "gpt2", "n_embd": 16, "n_head": 4}},
      "n_head is 4 there and 2 in .*; n_layer is 12 there and 2 in .*model.path, or",
    ),
    (
      {"model.hf_config": {"model_type": "llama", "vocab_size": 24}},
      "model_type is 'llama' there and 'gpt2' in",
    ),
  ],
)
def test_what_does_not_fit_is_an_error(base, tmp_path, changes, message):
  peers.tiny("bert", tmp_path / "bert")
  (tmp_path / "empty").mkdir()
  places = {"EMPTY": tmp_path / "empty", "BERT": tmp_path / "bert"}
  changes = {
    n: str(places.get(v, v)) if n.endswith("path") and v else v
    for n, v in changes.items()
  }
  data = write(tmp_path / "data", rows(4, 0), rows(2, 1))
  with pytest.raises(LoraxError, match=message):
    _prepare(shrunk("gpt3_175b.py", base, data, **changes))


def test_a_config_json_that_says_the_same_in_other_words_is_no_error(base, tmp_path):
  data = write(tmp_path, rows(4, 0), rows(2, 1))
  hf_config = {"model_type": "gpt2", "vocab_size": 24, "hidden_size": 16}
  hf_config |= {"n_layer": 2, "n_head": 2, "n_positions": 22, "initializer_range": 0.3}
  _prepare(shrunk("gpt3_175b.py", base, data, **{"model.hf_config": hf_config}))


def test_rows_that_are_too_long_are_cut_and_that_is_said(base, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  data = write(tmp_path, rows(22, 0), rows(9, 1))
  wanted = shrunk("gpt3_175b.py", base, data, **{"data.max_length": 14})
  made = _prepare(wanted)
  lengths = [len(row["input_ids"]) for row in [*rows(22, 0), *rows(9, 1)]]
  cut = [n - 14 for n in lengths if n > 14]
  assert (
    f"{len(cut)} of 31 rows are cut to data.max_length = 14; {sum(cut)} of "
    f"{sum(lengths)} tokens are left out" in caplog.text
  )
  assert max(next(made.data.batches)["attention_mask"].sum(-1)) <= 14


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_frozen_weights_in_bfloat16_train_float32_factors(trained, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  changes = {"model.dtype": "bfloat16", "model.param_dtype": "bfloat16"}
  changes |= {"train.steps": 1, "init_adapter": None}
  wanted = shrunk(
    "llama3_8b_instruct.py", trained.folder / "base", trained.data, **changes
  )
  made = run.prepare({tmp_path: wanted})
  assert {x.dtype.name for x in jax.tree.leaves(made.model.params)} == {"bfloat16"}
  assert "is in memory as bfloat16: 0.01 MB" in caplog.text
  [result] = loop.fit(made, tmp_path)
  assert math.isfinite(result["eval_loss"])
  tensors = safetensors.numpy.load_file(tmp_path / "adapter/adapter_model.safetensors")
  assert {x.dtype.name for x in tensors.values()} == {"float32"}
