"""The merge command against transformers and peft."""

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from experiments.merge import merge
from lorax_flax.errors import LoraxError
from tests.experiments import peers

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
  done = peers.run("merge", *flags)
  assert done.returncode == 0, done.stderr
  assert str(tmp_path / "out") in done.stdout
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert config["architectures"] == ["BertForSequenceClassification"]

  again = peers.run("merge", *flags)
  assert again.returncode == 1
  assert again.stderr.startswith("error: ")
  assert "not empty" in again.stderr
  assert "Traceback" not in again.stderr
