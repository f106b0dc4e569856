"""The predict command against transformers and peft."""

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from experiments.predict import predict
from lorax_flax.errors import LoraxError
from lorax_flax.hub.peft import folder as hub_peft
from tests.experiments import commands, peers

TEXTS = [
  {"text": "a man a plan a canal panama"},
  {"text": "no lemon no melon", "text_pair": "was it a cat i saw"},
  {"text": "cat"},
  {"text": "a plan a plan a plan", "text_pair": "xyzzy"},
  {"text": ""},
  {"text": "was it a man", "text_pair": "no"},
  {"text": "i saw a cat"},
]
INPUTS = [
  {"input_ids": [0, 4, 5, 2], "attention_mask": [1, 1, 1, 1]},
  {"input_ids": [0, 9, 2]},
  {"input_ids": [0, 6, 7, 8, 9, 10, 2, 1, 1], "attention_mask": [1] * 7 + [0, 0]},
  {"input_ids": [0, 7, 2, 2, 8, 2]},
]


def _write(file, lines):
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(file)


def _predict(tmp_path, lines, adapter=True, **kwargs):
  source, out = _write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
  folder = str(tmp_path / "adapter") if adapter else None
  count = predict(str(tmp_path / "base"), folder, source, str(out), **kwargs)
  results = [json.loads(line) for line in out.read_text().splitlines()]
  assert count == len(results) == len(lines)
  return results


def _logits(results):
  return np.array([result["logits"] for result in results])


@pytest.fixture(params=["bert", "roberta"])
def family(request):
  return request.param


@pytest.fixture
def adapted(family, tmp_path):
  model = peers.tiny(family, tmp_path / "base")
  return peers.adapt(model, tmp_path / "adapter")


@pytest.fixture
def tokenizer(tmp_path):
  return transformers.AutoTokenizer.from_pretrained(tmp_path / "base")


def test_texts_and_pairs_give_pefts_logits_in_order(adapted, tokenizer, tmp_path):
  results = _predict(tmp_path, TEXTS, batch_size=3)
  wanted = np.array(peers.logits(adapted, TEXTS, tokenizer))
  np.testing.assert_allclose(_logits(results), wanted, atol=1e-5)
  odds = np.exp(wanted) / np.exp(wanted).sum(1, keepdims=True)
  for result, row in zip(results, odds, strict=True):
    assert result.keys() == {"logits", "label", "score"}
    assert result["label"] == f"LABEL_{row.argmax()}"
    assert result["score"] == pytest.approx(row.max(), abs=1e-5)
  assert np.ptp(wanted, axis=0).min() > 0.01, "a wrong order would not show"


def test_inputs_as_they_are_give_pefts_logits(adapted, family, tmp_path):
  lines = [dict(line) for line in INPUTS]
  if family == "bert":
    lines[3]["token_type_ids"] = [0, 0, 0, 1, 1, 1]
  results = _predict(tmp_path, lines, batch_size=2)
  np.testing.assert_allclose(_logits(results), peers.logits(adapted, lines), atol=1e-5)


def test_batch_size_and_order_change_nothing(adapted, tmp_path):
  one = _logits(_predict(tmp_path, TEXTS, batch_size=1))
  all_at_once = _logits(_predict(tmp_path, TEXTS[::-1], batch_size=64))
  np.testing.assert_allclose(one, all_at_once[::-1], atol=2e-6)


def test_max_length_cuts_as_the_tokenizer_does(adapted, tokenizer, tmp_path):
  results = _predict(tmp_path, TEXTS, max_length=6)
  wanted = peers.logits(adapted, TEXTS, tokenizer, max_length=6)
  np.testing.assert_allclose(_logits(results), wanted, atol=1e-5)


def test_a_long_text_is_cut_to_what_the_model_can_take(
  adapted, tokenizer, family, tmp_path
):
  long = [{"text": "a man a plan " * 10}]
  room = {"bert": 22, "roberta": 20}[family]
  wanted = peers.logits(adapted, long, tokenizer, max_length=room)
  np.testing.assert_allclose(_logits(_predict(tmp_path, long)), wanted, atol=1e-5)


def test_a_base_with_a_head_needs_no_adapter(tokenizer_of_names, tmp_path):
  model, tokenizer = tokenizer_of_names
  results = _predict(tmp_path, TEXTS, adapter=False)
  wanted = np.array(peers.logits(model, TEXTS, tokenizer))
  np.testing.assert_allclose(_logits(results), wanted, atol=1e-5)
  labels = [result["label"] for result in results]
  assert labels == [peers.NAMES[row.argmax()] for row in wanted]


@pytest.fixture
def tokenizer_of_names(tmp_path):
  model = peers.tiny("bert", tmp_path / "base", names=peers.NAMES)
  return model, transformers.AutoTokenizer.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("head", [True, False])
def test_an_adapter_brings_its_own_head_and_labels(head, tmp_path):
  peers.tiny("bert", tmp_path / "base", head=False, num_labels=2)
  kind = transformers.BertForSequenceClassification
  model = kind.from_pretrained(tmp_path / "base").eval()
  adapted = peers.adapt(model, tmp_path / "adapter")
  (tmp_path / "adapter" / hub_peft.LABELS_FILE).write_text('["no", "yes"]')
  if head:  # the same body, and a head of three that the adapter's takes the place of
    _give_head(tmp_path / "base")
  results = _predict(tmp_path, INPUTS)
  wanted = np.array(peers.logits(adapted, INPUTS))
  np.testing.assert_allclose(_logits(results), wanted, atol=1e-5)
  assert [r["label"] for r in results] == [["no", "yes"][i] for i in wanted.argmax(1)]


def _give_head(base):
  file = base / "model.safetensors"
  tensors = {f"bert.{key}": value for key, value in load_file(file).items()}
  tensors["classifier.weight"] = np.ones((3, 16), np.float32)
  tensors["classifier.bias"] = np.ones(3, np.float32)
  save_file(tensors, file, metadata={"format": "pt"})
  config = json.loads((base / "config.json").read_text())
  config["id2label"] = dict(enumerate(peers.NAMES))
  (base / "config.json").write_text(json.dumps(config))


def test_regression_gives_logits_alone(tmp_path):
  model = peers.tiny("bert", tmp_path / "base", num_labels=1)
  results = _predict(tmp_path, INPUTS, adapter=False)
  assert all(result.keys() == {"logits"} for result in results)
  np.testing.assert_allclose(_logits(results), peers.logits(model, INPUTS), atol=1e-5)


def test_many_labels_have_a_probability_each_as_in_transformers_pipeline(tmp_path):
  peers.tiny("bert", tmp_path / "base", names=peers.NAMES)
  config = json.loads((tmp_path / "base/config.json").read_text())
  config["problem_type"] = "multi_label_classification"
  (tmp_path / "base/config.json").write_text(json.dumps(config))
  (got,) = _predict(tmp_path, [{"text": "was it a cat"}], adapter=False)
  pipe = transformers.pipeline("text-classification", model=str(tmp_path / "base"))
  wanted = {each["label"]: each["score"] for each in pipe("was it a cat", top_k=None)}
  assert got["scores"] == pytest.approx(wanted, abs=1e-5)
  assert got["label"] == max(wanted, key=wanted.get)
  assert got["score"] == got["scores"][got["label"]]


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
def test_a_head_of_another_task_is_refused_by_name(tmp_path, kind):
  peers.tiny("bert", tmp_path / "base")
  config = json.loads((tmp_path / "base/config.json").read_text())
  config["architectures"] = [f"BertFor{kind}"]
  (tmp_path / "base/config.json").write_text(json.dumps(config))
  with pytest.raises(LoraxError, match=f"BertFor{kind} is not built here"):
    _predict(tmp_path, [{"text": "was it a cat"}], adapter=False)


def test_a_base_without_a_head_needs_an_adapter(tmp_path):
  peers.tiny("bert", tmp_path / "base", head=False)
  with pytest.raises(LoraxError, match=r"has no classifier.*--adapter"):
    _predict(tmp_path, INPUTS, adapter=False)


GOOD = json.dumps({"input_ids": [0, 4, 2]})


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("", "is blank"),
    ("{", "is not JSON"),
    ("\xff", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1]", "is no object"),
    ('{"txt": "a"}', "did you mean 'text'"),
    ('{"text": "a"}', "another kind than line 1"),
    ('{"attention_mask": [1]}', 'either "text" or "input_ids"'),
    ('{"text": "a", "input_ids": [1]}', 'either "text" or "input_ids"'),
    ('{"input_ids": [0, 24]}', "24, and goes from 0 to 23"),
    ('{"input_ids": [-1]}', "-1, and goes from 0"),
    ('{"input_ids": []}', "missing or empty"),
    ('{"input_ids": [0.5]}', "integers"),
    ('{"input_ids": [[0]]}', "integers"),
    ('{"input_ids": 3}', "list"),
    ('{"input_ids": "abc"}', "list"),
    ('{"input_ids": [0, 2], "attention_mask": [1]}', "1 values, input_ids 2"),
    ('{"input_ids": [0], "attention_mask": [2]}', "2, and goes from 0 to 1"),
    ('{"input_ids": [0], "token_type_ids": [2]}', "2, and goes from 0 to 1"),
    (json.dumps({"input_ids": [4] * 23}), "23 tokens, and at most 22"),
    (json.dumps({"input_ids": [2**40]}), "32 bits"),
  ],
)
def test_a_bad_line_is_named_and_nothing_is_written(bert_base, line, says, tmp_path):
  source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n", encoding="latin-1")
  with pytest.raises(LoraxError, match="line 3") as error:
    predict(str(bert_base), None, str(source), str(out))
  assert says in str(error.value)
  assert list(tmp_path.iterdir()) == [source]


@pytest.fixture(scope="module")
def bert_base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models") / "base"
  peers.tiny("bert", folder)
  return folder


@pytest.mark.parametrize("text", ['{"text": 3}', '{"text": "a", "text_pair": ["b"]}'])
def test_a_text_that_is_no_string_is_named(bert_base, text, tmp_path):
  source = tmp_path / "in.jsonl"
  source.write_text('{"text": "a"}\n' + text + "\n")
  with pytest.raises(LoraxError, match="line 2"):
    predict(str(bert_base), None, str(source), str(tmp_path / "out.jsonl"))


def test_an_empty_and_a_missing_file_are_errors(bert_base, tmp_path):
  with pytest.raises(LoraxError, match="no file"):
    predict(str(bert_base), None, str(tmp_path / "in"), str(tmp_path / "out"))
  (tmp_path / "in").write_text("")
  with pytest.raises(LoraxError, match="is empty"):
    predict(str(bert_base), None, str(tmp_path / "in"), str(tmp_path / "out"))


def test_more_tokens_than_the_model_takes_are_refused(bert_base, tmp_path):
  source = _write(tmp_path / "in.jsonl", TEXTS)
  with pytest.raises(LoraxError, match="takes 22 tokens"):
    predict(str(bert_base), None, source, str(tmp_path / "out"), max_length=23)


def test_the_command_prints_where_it_wrote_and_keeps_an_old_file_on_failure(tmp_path):
  model = peers.tiny("bert", tmp_path / "base")
  adapted = peers.adapt(model, tmp_path / "adapter")
  source, out = _write(tmp_path / "in.jsonl", INPUTS), tmp_path / "deep/out.jsonl"
  flags = [f"--base={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}"]
  done = commands.run(
    "experiments.predict", *flags, f"--input={source}", f"--out={out}"
  )
  assert done.returncode == 0, done.stderr
  assert f"{out} (4 lines)" in done.stdout
  written = out.read_text()
  results = [json.loads(line) for line in written.splitlines()]
  np.testing.assert_allclose(_logits(results), peers.logits(adapted, INPUTS), atol=1e-5)

  flags = [f"--base={tmp_path / 'bsae'}", f"--input={source}", f"--out={out}"]
  failed = commands.run("experiments.predict", *flags)
  assert failed.returncode == 1
  assert failed.stderr.startswith("error: no folder")
  assert f"did you mean {tmp_path / 'base'}" in failed.stderr
  assert "Traceback" not in failed.stderr
  assert out.read_text() == written


def test_lines_come_from_standard_input_and_go_to_standard_output(tmp_path):
  peers.tiny("bert", tmp_path / "base", num_labels=3)
  base, source = f"--base={tmp_path / 'base'}", tmp_path / "in.jsonl"
  _write(source, INPUTS)
  to_file = commands.run(
    "experiments.predict", base, f"--input={source}", f"--out={tmp_path / 'out.jsonl'}"
  )
  assert to_file.returncode == 0, to_file.stderr
  with source.open() as stream:
    piped = peers.python(
      *("-m", "experiments.predict", base, "--input=/dev/stdin", "--out=-"),
      stdin=stream,
    )
  assert piped.stdout == (tmp_path / "out.jsonl").read_text(), piped.stderr
  assert "Predictions: - (4 lines)" in piped.stderr


def test_the_input_is_never_replaced(bert_base, tmp_path):
  source = tmp_path / "in.jsonl"
  _write(source, INPUTS)
  (tmp_path / "link").symlink_to(source)
  before = source.read_bytes()
  for out in (source, tmp_path / "link"):
    with pytest.raises(LoraxError, match="is --input: it would be replaced"):
      predict(str(bert_base), None, str(source), str(out))
  assert source.read_bytes() == before


def test_help_explains_and_a_mistyped_flag_suggests():
  done = commands.run("experiments.predict", "--help")
  assert done.returncode == 0
  for words in ("text_pair", "--adapter", "--batch_size", "default: '32'"):
    assert words in done.stdout
  typo = commands.run("experiments.predict", "--inptu=x")
  assert typo.returncode == 1
  assert "Did you mean: input" in typo.stderr
  assert "Traceback" not in typo.stderr
