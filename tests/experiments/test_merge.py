"""The merge command against transformers and peft."""

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from experiments.merge import merge
from lorax_flax.errors import LoraxError
from tests.experiments import commands, peers

LINES = [{"text": "a man a plan"}, {"text": "was it a cat", "text_pair": "i saw"}]


@pytest.fixture
def base(tmp_path):
  peers.tiny("bert", tmp_path / "base", names=peers.NAMES)
  return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
  model = transformers.BertForSequenceClassification.from_pretrained(base)
  peers.adapt(model, tmp_path / "adapter")
  return tmp_path / "adapter"


def _everything(folder):
  return {
    str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
  }


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("head", [True, False])
def test_transformers_loads_the_merged_checkpoint_to_the_same_logits(
  family, head, tmp_path
):
  base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
  peers.tiny(family, base, head=head)
  kind = transformers.AutoModelForSequenceClassification
  adapted = peers.adapt(kind.from_pretrained(base, num_labels=3), adapter)
  merge(str(base), str(adapter), str(out))
  merged, info = kind.from_pretrained(out, output_loading_info=True)
  assert not any(info.values()), "transformers misses or doesn't know a key"
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  got = peers.logits(merged.eval(), LINES, tokenizer)
  wanted = peers.logits(adapted, LINES, tokenizer)
  np.testing.assert_allclose(got, wanted, atol=1e-4)
  # Tighter where the peer merges too: what is left is the order of two sums.
  wanted = peers.logits(adapted.merge_and_unload(), LINES, tokenizer)
  np.testing.assert_allclose(got, wanted, atol=1e-5)
  stored = load_file(out / "model.safetensors")
  assert {str(v.dtype) for v in stored.values()} == {"float32"}


def test_the_tokenizer_is_the_bases(base, adapter, tmp_path):
  merge(str(base), str(adapter), str(tmp_path / "out"))
  before, after = _everything(base), _everything(tmp_path / "out")
  names = [name for name in before if "token" in name]
  assert names
  for name in names:
    assert after[name] == before[name]


def test_the_merged_checkpoint_is_a_base_again(base, adapter, tmp_path):
  merge(str(base), str(adapter), str(tmp_path / "once"))
  merge(str(tmp_path / "once"), str(adapter), str(tmp_path / "twice"))
  once = load_file(tmp_path / "once/model.safetensors")
  twice = load_file(tmp_path / "twice/model.safetensors")
  moved = {key for key in once if (once[key] != twice[key]).any()}
  assert len(moved) == 2 * 4 + 1, "query and the three dense layers, and the pooler"


def test_a_folder_that_is_not_empty_is_kept(base, adapter, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "thesis.tex").write_text("years")
  for overwrite in (False, True):
    with pytest.raises(LoraxError, match=r"not empty: it holds thesis\.tex"):
      merge(str(base), str(adapter), str(out), overwrite=overwrite)
  assert _everything(out) == {"thesis.tex": b"years"}


def test_overwrite_replaces_a_checkpoint_whole(base, adapter, tmp_path):
  out = tmp_path / "out"
  merge(str(base), str(adapter), str(out))
  wanted = _everything(out)
  (out / "config.json").write_text("old")
  with pytest.raises(LoraxError, match="not empty"):
    merge(str(base), str(adapter), str(out))
  merge(str(base), str(adapter), str(out), overwrite=True)
  assert _everything(out) == wanted


def test_overwrite_keeps_a_folder_with_more_in_it(base, adapter, tmp_path):
  out = tmp_path / "out"
  merge(str(base), str(adapter), str(out))
  (out / "NOTES.md").write_text("six weeks")
  before = _everything(out)
  with pytest.raises(LoraxError, match=r"it holds NOTES\.md, not written by this"):
    merge(str(base), str(adapter), str(out), overwrite=True)
  assert _everything(out) == before


def test_what_is_read_is_never_replaced(base, adapter):
  before = _everything(base)
  with pytest.raises(LoraxError, match="which is read from"):
    merge(str(base), str(adapter), str(base), overwrite=True)
  assert _everything(base) == before


def test_a_failure_leaves_nothing_behind(base, adapter, tmp_path):
  weights = adapter / "adapter_model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1])
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(LoraxError, match="cannot read"):
    merge(str(base), str(adapter), str(tmp_path / "out"))
  assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_of_another_base_is_an_error(adapter, tmp_path):
  peers.tiny("roberta", tmp_path / "other")
  with pytest.raises(LoraxError, match="adapter"):
    merge(str(tmp_path / "other"), str(adapter), str(tmp_path / "out"))


def test_the_command_says_where_it_wrote_and_refuses_in_one_line(
  base, adapter, tmp_path
):
  flags = [f"--base={base}", f"--adapter={adapter}", f"--out={tmp_path / 'out'}"]
  done = commands.run("experiments.merge", *flags)
  assert done.returncode == 0, done.stderr
  assert str(tmp_path / "out") in done.stdout
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert config["architectures"] == ["BertForSequenceClassification"]

  again = commands.run("experiments.merge", *flags)
  assert again.returncode == 1
  assert again.stderr.startswith("error: ")
  assert "not empty" in again.stderr
  assert "Traceback" not in again.stderr


def _config(folder):
  return json.loads((folder / "config.json").read_text())


def test_a_bases_problem_type_and_names_are_kept_as_peft_keeps_them(
  base, adapter, tmp_path
):
  config = _config(base) | {"problem_type": "multi_label_classification"}
  (base / "config.json").write_text(json.dumps(config))
  model = transformers.BertForSequenceClassification.from_pretrained(base)
  peers.adapt(model, adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
  merge(str(base), str(adapter), str(tmp_path / "out"))
  got, wanted = _config(tmp_path / "out"), _config(tmp_path / "peft")
  for name in ("problem_type", "id2label", "label2id"):
    assert got[name] == wanted[name]
  assert tuple(got["id2label"].values()) == peers.NAMES


def test_an_adapters_names_and_another_number_of_outputs_replace_the_bases(
  base, adapter, tmp_path
):
  config = _config(base) | {"problem_type": "multi_label_classification"}
  (base / "config.json").write_text(json.dumps(config))
  (adapter / "labels.json").write_text('["x", "y", "z"]')
  merge(str(base), str(adapter), str(tmp_path / "named"))
  named = _config(tmp_path / "named")
  assert named["id2label"] == {"0": "x", "1": "y", "2": "z"}
  assert "problem_type" not in named

  kind = transformers.BertForSequenceClassification
  other = kind.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
  peers.adapt(other, tmp_path / "five")
  merge(str(base), str(tmp_path / "five"), str(tmp_path / "out"))
  got = _config(tmp_path / "out")
  assert got["id2label"] == {str(i): f"LABEL_{i}" for i in range(5)}
  assert got["problem_type"] == "multi_label_classification"


def test_what_lies_beside_the_weights_is_carried(base, adapter, tmp_path):
  carried = ("spm.model", "chat_template.json", "LICENSE", "templates/tool.jinja")
  left = ("pytorch_model.bin", "optimizer.pt", ".gitattributes", "onnx/model.onnx")
  for name in (*carried, *left, "onnx/config.json"):
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text(name)
  merge(str(base), str(adapter), str(tmp_path / "out"))
  found = _everything(tmp_path / "out")
  assert {name: found[name].decode() for name in carried} == dict(
    zip(carried, carried, strict=True)
  )
  ours = {"model.safetensors", ".lorax_flax.json", "README.md", "receipt.json"}
  assert found.keys() - ours == _everything(base).keys() - {
    *left,
    "onnx/config.json",
    "model.safetensors",
  }


def test_an_adapters_own_tokenizer_takes_the_place_of_the_bases(
  base, adapter, tmp_path
):
  (base / "vocab.txt").write_text("old")
  (base / "processor_config.json").write_text("{}")
  (adapter / "tokenizer.json").write_text("new")
  (adapter / "README.md").write_text("of the adapter")
  merge(str(base), str(adapter), str(tmp_path / "out"))
  found = _everything(tmp_path / "out")
  assert found["tokenizer.json"] == b"new"
  assert "vocab.txt" not in found
  assert b"of the adapter" not in found["README.md"]
  assert "processor_config.json" in found


@pytest.mark.parametrize(
  ("value", "form", "named"),
  [
    (np.nan, "transformers", r"query\.weight"),
    (1e30, "transformers", r"query\.weight"),
    (np.inf, "transformers", r"query\.weight"),
    (np.nan, "orbax", "query/kernel"),
    (np.nan, "stablehlo", "query/kernel"),
  ],
)
def test_a_sum_that_is_not_finite_is_named_and_nothing_is_written(
  base, adapter, tmp_path, value, form, named
):
  half = {
    k: v.astype(np.float16) for k, v in load_file(base / "model.safetensors").items()
  }
  save_file(half, base / "model.safetensors", metadata={"format": "pt"})
  file = adapter / "adapter_model.safetensors"
  factors = load_file(file)
  name = next(key for key in factors if "query.lora_B" in key)
  factors[name] = np.full_like(factors[name], value)
  save_file(factors, file, metadata={"format": "pt"})
  with pytest.raises(LoraxError, match=f"{named} would be .*NaN or infinite"):
    merge(str(base), str(adapter), str(tmp_path / "out"), form)
  assert not (tmp_path / "out").exists()
