"""E2E from the config to the table, on a tiny GPT-2."""

import json
import math
import shutil
from dataclasses import replace

import pycocoevalcap  # noqa: F401 (left out where it is not installed)
import pytest
import sacrebleu  # noqa: F401
import torch
import transformers

from experiments import e2e, generate, run
from experiments.cli import config_flag
from experiments.inference import scored
from lorax_flax.errors import LoraxError
from lorax_flax.metrics import captions, texts
from lorax_flax.serve.settings import Decoding
from tests.data import test_e2e as data
from tests.experiments import own_text, token_ids

DECODING = Decoding(max_new_tokens=12, beams=2, no_repeat_ngram=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A random GPT-2 with the tokenizer of the other decoder."""
  folder = tmp_path_factory.mktemp("base")
  tokenizer = own_text.decoder(folder)
  torch.manual_seed(0)
  config = transformers.GPT2Config(
    vocab_size=len(tokenizer),
    n_positions=200,
    n_embd=16,
    n_layer=2,
    n_head=2,
    initializer_range=0.3,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
  )
  transformers.GPT2LMHeadModel(config).save_pretrained(folder)
  return folder


def _settings(spec, base, folder):
  values = {
    "model.path": str(base),
    "data.path": str(data.write(folder)),
    "data.max_length": 180,
    "data.buckets": 1,
    "train.epochs": None,
    "train.steps": 12,
    "train.warmup_steps": None,
    "train.batch_size": 3,
    "train.learning_rate": 0.05,
  }
  return token_ids.changed(config_flag.load(spec), values)


def test_the_papers_config_trains_query_and_value_and_its_texts_are_scored(
  base, tmp_path
):
  settings = _settings("e2e_gpt2_medium.py", base, tmp_path / "data")
  workdir = tmp_path / "run"
  result = run.run(settings, workdir)
  # Two layers: two parts of an a of 16 x 4 and a b of 4 x 16.
  assert result["trained_parameters"] == 2 * 2 * (16 * 4 + 4 * 16)
  assert result["eval_loss"] < math.log(result["perplexity"]) + 1e-3
  assert result["eval_loss"] < 5.0
  found = e2e.evaluate(settings, workdir, DECODING, split="test", rows=2)
  assert tuple(found) == texts.NAMES
  folder = workdir / "test"
  assert json.loads((folder / "scores.json").read_text()) == found
  assert list(map(len, scored.references(folder / "references.txt"))) == [2, 1]
  prompts = (folder / "prompts.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in prompts]
  assert lines[1]["prompt"].endswith("| near : Café Rouge<|begin|>")
  outputs = scored.outputs(folder / "outputs.jsonl")
  assert len(outputs) == 2
  again = texts.scores(outputs, scored.references(folder / "references.txt"))
  assert again == found


def test_another_task_or_split_is_refused(base, tmp_path):
  settings = _settings("e2e_gpt2_medium.py", base, tmp_path / "data")
  with pytest.raises(LoraxError, match=r"--split.*'tset'; did you mean 'test'"):
    e2e.evaluate(settings, tmp_path, DECODING, split="tset")
  other = config_flag.choose("quickstart.py").settings()
  with pytest.raises(LoraxError, match=r"data\.task is headlines, and e2e is needed"):
    e2e.evaluate(other, tmp_path, DECODING)


def test_texts_are_written_on_the_quantised_base_of_the_run(
  base, tmp_path, monkeypatch
):
  settings = _settings("e2e_gpt2_medium.py", base, tmp_path / "data")
  settings = replace(settings, model=replace(settings.model, quant="int8"))
  monkeypatch.setattr(generate, "generate", lambda *_, quant, **__: found.append(quant))
  monkeypatch.setattr(scored, "outputs", lambda file: [])
  monkeypatch.setattr(texts, "scores", lambda *_: {})
  found = []
  for _ in range(2):
    e2e.evaluate(settings, tmp_path, DECODING)
    shutil.copytree(base, tmp_path / "model", dirs_exist_ok=True)
  # A model in full has the quantised numbers in it.
  assert found == ["int8", None]


def test_score_reads_groups_by_their_mr_and_one_reference_a_line(tmp_path):
  file = data.write(tmp_path, names=("refs",)) / "refs.csv"
  assert list(map(len, scored.references(file))) == [2, 1]
  (tmp_path / "refs.txt").write_text("one\ntwo\n")
  assert scored.references(tmp_path / "refs.txt") == [["one"], ["two"]]
  (tmp_path / "out.jsonl").write_text('{"text": " a  b\\n\\nrest"}\n')
  assert scored.outputs(tmp_path / "out.jsonl") == ["a b"]
  (tmp_path / "out.jsonl").write_text('{"texts": "a"}\n')
  with pytest.raises(LoraxError, match="line 1 has no 'text'"):
    scored.outputs(tmp_path / "out.jsonl")
  with pytest.raises(LoraxError, match=r"ending '\.json'"):
    scored.outputs(tmp_path / "out.json")
  assert texts.NAMES[2:] == captions.NAMES
