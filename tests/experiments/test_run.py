import dataclasses
import gc
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import transformers
from absl import flags

from experiments import run
from experiments.cli import command, config_dict, config_flag
from experiments.inference import merged
from lorax_flax import hub
from lorax_flax.data import tasks as datasets
from lorax_flax.data.examples import Splits
from lorax_flax.data.tokenize import load_tokenizer, tokenize
from lorax_flax.errors import LoraxError
from lorax_flax.files import lock
from lorax_flax.jobs import claim
from lorax_flax.models import registry
from lorax_flax.tasks import classification
from lorax_flax.tasks.task import TASKS
from lorax_flax.train import loop
from tests.experiments import commands, peers

SHRUNK = {
  "model.path": "BASE",
  "data.max_length": 12,
  "data.buckets": 1,
  "train.epochs": None,
  "train.steps": 12,
  "train.batch_size": 8,
  "train.learning_rate": 0.02,
  "train.log_steps": 4,
}


def _examples(count, seed, classes=2):
  rng = np.random.default_rng(seed)
  words = peers.WORDS.split()[4:]
  for _ in range(count):
    text = [words[i] for i in rng.integers(0, len(words), 6)]
    label = min(text.count("cat") + text.count("man"), classes - 1)
    yield {"text": " ".join(text), "text_pair": None, "label": label}


def _splits(classes=2):
  train, held_out = list(_examples(64, 0, classes)), list(_examples(30, 1, classes))
  return Splits(train, {"validation": held_out})


@pytest.fixture(scope="module", autouse=True)
def headlines():
  """A small task in the place of the quick start's."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(classification.data, "load", lambda *args, **kwargs: _splits())
    yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A small random encoder, with a tokenizer and without a head."""
  folder = tmp_path_factory.mktemp("base")
  peers.tiny("bert", folder, head=False)
  return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, headlines):
  """A run of the quick start, shrunk."""
  folder = tmp_path_factory.mktemp("trained")
  run.run(_settings("quickstart.py", base), folder)
  return folder


def _settings(spec, base, **changes):
  config = config_flag.load(spec)
  values = SHRUNK | {"model.path": str(base)} | changes
  with config.unlocked():
    for name, value in values.items():
      section, _, field = name.rpartition(".")
      (config[section] if section else config)[field] = value
  return config_dict.convert(config)


def _prepare(settings):
  return run.prepare({Path(): settings})


def _logits(whole, examples):
  rows = tokenize(
    examples, load_tokenizer(whole.loaded.folder), max_length=12, token_types=True
  )
  batch = rows.batch(np.arange(len(rows)), 16)
  inputs = {name: x for name, x in batch.items() if x.ndim == 2}
  return np.asarray(
    whole.loaded.module.apply({"params": whole.loaded.params}, **inputs)
  )


def _parse(*arguments):
  """What the command makes of its arguments."""
  values = flags.FlagValues()
  config_flag.define(values)
  command.parse(values, ["run", *arguments])
  return config_flag.read(values).settings()


def test_the_quick_start_shrunk_writes_all_that_it_says(trained):
  assert {p.name for p in trained.iterdir()} == {
    *("adapter", "checkpoints", "config.json", "confusion.png", "curves.png"),
    *("metrics.jsonl", "report.html", "result.json", "tensorboard"),
  }
  result = json.loads((trained / "result.json").read_text())
  for name in ("accuracy", "train_seconds", "examples_evaluated", "trained_parameters"):
    assert isinstance(result[name], float | int)
  assert result["examples_evaluated"] == 30
  assert result["steps"] == 12
  assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 12
  tensors = safetensors.numpy.load_file(trained / "adapter/adapter_model.safetensors")
  assert result["trained_parameters"] == sum(x.size for x in tensors.values())


def test_the_adapter_written_scores_what_the_result_says(trained, base):
  whole = merged.load(str(base), str(trained / "adapter"))
  assert whole.labels == ("sincere", "sarcastic")
  lines = list(_examples(30, 1))
  labels = np.array([line["label"] for line in lines])
  accuracy = (_logits(whole, lines).argmax(-1) == labels).mean()
  result = json.loads((trained / "result.json").read_text())
  assert accuracy == pytest.approx(result["accuracy"])


def test_a_finished_run_says_so_and_gives_its_result(trained, base, caplog):
  caplog.set_level("INFO", "lorax_flax")
  before = (trained / "result.json").read_text()
  result = run.run(_settings("quickstart.py", base), trained)
  assert "holds this run, finished" in caplog.text
  assert json.loads(before) == result
  assert (trained / "result.json").read_text() == before


def test_another_config_in_the_same_workdir_is_an_error(trained, base):
  with pytest.raises(LoraxError, match=r"lora\.rank is 8 there and 4 here"):
    run.run(_settings("quickstart.py", base, **{"lora.rank": 4}), trained)


@pytest.mark.parametrize("changed", ["data.validation", "base", "tokenizer"])
def test_a_run_is_not_resumed_from_something_else(changed, base, tmp_path, monkeypatch):
  made, own = tmp_path / "run", tmp_path / "base"
  shutil.copytree(base, own)
  wanted = _settings("quickstart.py", own)
  claim.claim({made: wanted}, _prepare(wanted).fingerprints)
  claim.claim({made: wanted}, _prepare(wanted).fingerprints)
  if changed == "base":
    weights = own / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  elif changed == "tokenizer":
    (own / "special_tokens_map.json").write_text("{}")
  else:
    other = Splits(_splits().train, {"validation": list(_examples(30, 2))})
    monkeypatch.setattr(classification.data, "load", lambda *args, **kwargs: other)
  with pytest.raises(LoraxError, match=f"holds a run whose {changed} was not the same"):
    run.run(wanted, made)
  assert not (made / "metrics.jsonl").exists()


def test_a_second_run_in_one_workdir_is_refused(base, tmp_path):
  with (
    lock.held(tmp_path),
    pytest.raises(LoraxError, match=f"a run is under way in {tmp_path}"),
  ):
    run.run(_settings("quickstart.py", base), tmp_path)


def _live_bytes():
  gc.collect()
  return sum(x.nbytes for x in jax.live_arrays())


def test_full_fine_tuning_has_the_weights_once_and_writes_what_transformers_loads(
  tmp_path, base, monkeypatch
):
  workdir, live, before = tmp_path / "run", [], _live_bytes()
  wanted = _settings("quickstart.py:full", base, **{"train.steps": 2})
  monkeypatch.setattr(
    loop._Loop, "_save_is_due", lambda *_: live.append(_live_bytes() - before)
  )
  result = run.run(wanted, workdir)
  # Weights and two moments in float32; the rest are batches and metrics.
  trained = 3 * 4 * result["trained_parameters"]
  assert trained <= live[0] < 1.05 * trained
  assert not (workdir / "adapter").exists()
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    workdir / "model"
  )
  assert model.config.id2label == {0: "sincere", 1: "sarcastic"}
  assert result["trained_parameters"] == model.num_parameters()
  assert result["model"] == str(workdir / "model")


def test_an_adapter_that_peft_loads(trained, base):
  config = peft.PeftConfig.from_pretrained(trained / "adapter")
  assert (config.r, config.lora_alpha, config.task_type) == (8, 16, "SEQ_CLS")
  assert config.base_model_name_or_path == str(base)


def test_the_adapters_card_is_one_that_the_hub_reads(trained, base):
  card = huggingface_hub.ModelCard.load(trained / "adapter/README.md")
  result = json.loads((trained / "result.json").read_text())
  data = card.data
  assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")
  assert data.base_model == str(base)
  assert {"lora", f"base_model:adapter:{base}"} <= {*data.tags}
  scores = {each.metric_type: each.metric_value for each in data.eval_results}
  assert scores == {name: result[name] for name in ("accuracy", "eval_loss")}
  assert "| rank | 8 |" in card.text
  assert "| train | 64 examples |" in card.text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("heading", ["Load with PEFT", "Load with lorax_flax"])
def test_the_code_in_the_card_loads_the_adapter(trained, heading, monkeypatch):
  monkeypatch.chdir(trained / "adapter")
  text = (trained / "adapter/README.md").read_text()
  code = re.search(rf"## {heading}\n\n```python\n(.*?)```", text, re.S)[1]
  found: dict = {}
  exec(code, found)
  if heading == "Load with PEFT":
    [kernel] = [
      x
      for name, x in found["model"].state_dict().items()
      if name.endswith("layer.0.attention.self.query.lora_B.default.weight")
    ]
    assert np.abs(kernel.numpy()).max() > 0
  else:
    name = "encoder/layer_0/attention/query/kernel"
    assert np.abs(found["saved"].adapter[name].b).max() > 0


def test_the_report_says_what_was_trained_and_how_to_use_it(trained, base):
  page = (trained / "report.html").read_text()
  for text in (str(base), "train.learning_rate", "sarcastic"):
    assert text in page
  assert f"lorax merge --base={base} --adapter={trained}/adapter" in page
  assert '<th scope="col">true class</th><th scope="col">sincere</th>' in page


def test_starting_from_an_adapter_takes_its_factors_and_a_fitting_head(
  trained, base, monkeypatch, caplog
):
  caplog.set_level("INFO", "lorax_flax")
  source = str(trained / "adapter")
  job = _prepare(_settings("quickstart.py", base, init_adapter=source))
  start = job.runs[0]
  fresh = _prepare(_settings("quickstart.py", base)).runs[0]
  assert "the head is taken too" in caplog.text
  wanted = hub.read_adapter(source, job.model.params, _keymap(base))[0]
  for path, delta in wanted.items():
    for name in delta.trained:
      value = getattr(start.adapter[path], name)
      np.testing.assert_array_equal(value, getattr(delta, name))
      assert not np.array_equal(value, getattr(fresh.adapter[path], name)), path

  # Three classes instead of two: the factors are taken, the head is not.
  monkeypatch.setattr(classification.data, "load", lambda *args, **kwargs: _splits(3))
  three = dataclasses.replace(datasets.get("headlines"), labels=("none", "one", "more"))
  monkeypatch.setitem(TASKS, "headlines", classification.task(three))
  other = _prepare(_settings("quickstart.py", base, init_adapter=source)).runs[0]
  assert "new: it has 2 labels there and 3 here" in caplog.text
  assert other.adapter["classifier/kernel"].value.shape[-1] == 3
  path = "encoder/layer_0/attention/query/kernel"
  np.testing.assert_array_equal(other.adapter[path].b, wanted[path].b)


def _keymap(base):
  return registry.load(base, num_labels=2).keymap


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lora.rank": 4}, "set --config.lora.rank=8"),
    ({"lora.alpha": 4.0}, "set --config.lora.alpha=16"),
    ({"lora.targets": ".*/(query|value)/kernel"}, "only that adapter has"),
  ],
)
def test_starting_from_an_adapter_of_another_shape_is_an_error(
  trained, base, changes, message
):
  source = str(trained / "adapter")
  with pytest.raises(LoraxError, match=message):
    _prepare(_settings("quickstart.py", base, init_adapter=source, **changes))


def test_a_run_starts_from_an_adapter_of_dora_where_the_flag_says_so(tmp_path, base):
  dora = {"lora.use_dora": True, "train.steps": 1}
  run.run(_settings("quickstart.py", base, **dora), tmp_path / "first")
  start = {"init_adapter": str(tmp_path / "first" / "adapter"), "train.steps": 1}
  with pytest.raises(LoraxError, match=r"has DoRA .*: set --config\.lora\.(.*)$") as e:
    run.run(_settings("quickstart.py", base, **start), tmp_path / "refused")
  flag = str(e.value).rpartition("set ")[2]
  complying = dataclasses.replace(
    _settings("quickstart.py", base, **start),
    lora=_parse("--config=quickstart.py", flag).lora,
  )
  run.run(complying, tmp_path / "second")
  tensors = safetensors.numpy.load_file(
    tmp_path / "second" / "adapter/adapter_model.safetensors"
  )
  assert any("magnitude" in name for name in tensors)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lora.tuned": ()}, "Name it in lora.tuned"),
    ({"data.max_length": 30}, "this model takes at most 22 tokens"),
    ({"lora.targets": ".*/qery/kernel"}, "qery"),
    ({"model.path": "nowhere/at/all"}, "no folder nowhere/at/all"),
  ],
)
def test_what_does_not_fit_the_model_is_an_error(base, changes, message):
  with pytest.raises(LoraxError, match=message):
    _prepare(_settings("quickstart.py", base, **changes))


def test_a_token_that_has_no_embedding_is_named_before_a_step(base, monkeypatch):
  def more(rows, *args):
    return dataclasses.replace(rows, input_ids_S=rows.input_ids_S + 1000)

  usual = classification.tokenize
  monkeypatch.setattr(
    classification, "tokenize", lambda *args, **kwargs: more(usual(*args, **kwargs))
  )
  with pytest.raises(
    LoraxError, match=r"headlines, train: example 1: input_ids has 1\d+, and goes from"
  ):
    _prepare(_settings("quickstart.py", base))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=quickstrat.py"], "did you mean 'quickstart'"),
    (["--config=nope.py"], "There are: chat, classify, complete, e2e_gpt2_large, "),
    (["--config=glue_rte.py:lrge"], "glue_rte.py:large, glue_rte.py:large_dagger"),
    (["--config=Q", "--config.train.lerning_rate=1"], "did you mean 'train.learning_r"),
    (["--config=Q", "--config.rank=4"], "did you mean 'lora.rank'"),
    (["--config=Q", "--config.train={}"], "config.train is a section"),
    (
      ["--config=Q", "--config.train.batch_size=many"],
      "--config.train.batch_size=many",
    ),
    (
      ["--config=Q", "--config.train.epochs=1", "--config.train.steps=2"],
      "not several",
    ),
    (["--config=Q", "--config.train.schedule=lineer"], "did you mean 'linear'"),
    (["--config=Q", "--config.model.dtype=float16"], "did you mean 'bfloat16'"),
    (["--config=Q", "--config.data.task=rta"], "did you mean 'rte'"),
    (["--config=Q", "--config.lora.targets=7"], "named by a text or several, not 7"),
    (["--config=Q", "--config.seed=-1"], "train.seed can't be negative"),
  ],
)
def test_a_mistake_in_the_arguments_is_named(arguments, message):
  arguments = [a.replace("=Q", "=quickstart.py") for a in arguments]
  with pytest.raises((LoraxError, flags.Error)) as error:
    _parse(*arguments)
  assert message in str(error.value)


def test_the_names_that_are_relied_on():
  found = _parse(
    "--config=glue_rte.py",
    "--config.model.path=minilm",
    "--config.data.glue_dir=../glue",
    "--config.train.epochs=3",
    "--config.train.batch_size=4",
    "--config.train.learning_rate=1e-2",
    "--config.lora.rank=2",
    "--config.lora.alpha=3",
    "--config.lora.targets=query,value",
    "--config.seed=5",
    "--config.init_adapter=there",
  )
  assert found.model.path == "minilm"
  assert found.data.glue_dir == "../glue"
  assert (found.train.epochs, found.train.batch_size) == (3.0, 4)
  assert (found.train.learning_rate, found.train.seed) == (0.01, 5)
  assert (found.lora.rank, found.lora.alpha) == (2, 3.0)
  assert found.lora.targets == ("query", "value")
  assert found.init_adapter == "there"


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("all-linear", "all-linear"),
    (".*/(query|value)/kernel", ".*/(query|value)/kernel"),
    ("('query', 'value')", ("query", "value")),
    ("query", ("query",)),
    ("attention/query,value", ("attention/query", "value")),
    ("()", ()),
  ],
)
def test_targets_are_a_pattern_or_names(text, wanted):
  found = _parse("--config=quickstart.py", f"--config.lora.targets={text}")
  assert found.lora.targets == wanted


def test_a_duration_given_takes_the_place_of_the_configs():
  found = _parse(
    "--config=quickstart.py", "--config.train.steps=7", "--config.train.warmup_steps=2"
  )
  assert (found.train.steps, found.train.epochs) == (7, None)
  assert (found.train.warmup_steps, found.train.warmup_fraction) == (2, None)


def test_a_file_of_the_users_own(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  mine = tmp_path / "mine.py"
  mine.write_text(
    "from experiments.configs import common\n"
    "def get_config():\n"
    "  config = common.base()\n"
    "  config.train.epochs = 5.0\n"
    "  return config\n"
  )
  assert _parse("--config=mine.py").train.epochs == 5.0
  assert config_flag.default_workdir("mine.py") == Path("runs/mine")
  assert config_flag.default_workdir("glue_rte.py:large") == Path("runs/glue_rte-large")
  for text, message in (
    ("x = 1\n", "no function get_config"),
    ("def get_config(): return 1 / 0\n", "ZeroDivisionError"),
    ("def get_config(: pass\n", "SyntaxError"),
    ("def get_config(): return {}\n", "returned no ConfigDict"),
  ):
    mine.write_text(text)
    with pytest.raises((LoraxError, flags.Error), match=message):
      _parse("--config=mine.py")


def _command(*arguments, cwd):
  hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
  return commands.run("experiments.run", *arguments, cwd=cwd, **hub)


def test_the_command_refuses_without_a_traceback_and_helps(tmp_path):
  for name in ("lr=1e-2," * 40, "/proc/x"):
    told = _command("--config=quickstart.py", f"--workdir={name}", cwd=tmp_path)
    assert told.returncode == 1
    assert "Traceback" not in told.stderr
    assert re.search(r"^error: (File name too long|No such file or d)", told.stderr)
  refused = _command("--config=glue_rte.py", cwd=tmp_path)
  assert refused.returncode == 1
  assert "Traceback" not in refused.stderr
  assert "FacebookAI/roberta-base" in refused.stderr
  assert "minilm" in refused.stderr
  assert len(refused.stderr.strip().splitlines()) == 1
  # Nothing that would be in the way of trying again with another config.
  assert not (tmp_path / "runs/glue_rte/config.json").exists()

  helped = _command("--help", cwd=tmp_path)
  assert helped.returncode == 0
  for text in ("--config=quickstart.py", "glue_rte.py", "RTE:", "lora.rank = 8"):
    assert text in helped.stdout


@pytest.mark.real_data
def test_glue_rte_trains_on_the_real_rte(real_data, tmp_path):
  peers.tiny("roberta", tmp_path / "base", head=False)
  done = _command(
    "--config=glue_rte.py",
    "--workdir=run",
    f"--config.data.glue_dir={real_data / 'glue'}",
    "--config.model.path=base",
    "--config.data.max_length=16",
    "--config.train.steps=3",
    "--config.data.buckets=1",
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "run/result.json").read_text())
  assert result["examples_evaluated"] == 277
  assert 0 < result["accuracy"] < 1
  assert "run/result.json" in done.stdout
  assert "accuracy" in done.stdout
  assert done.stderr == ""
