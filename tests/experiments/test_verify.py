"""Adapters that prove themselves: provenance.json, its check, other bases."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from experiments import run
from lorax_flax.errors import LoraxError
from lorax_flax.hub import provenance as hub_provenance
from lorax_flax.jobs import provenance
from lorax_flax.models import registry, with_adapter
from tests.experiments import commands, own_text
from tests.hub.peft import peers as hub_peers

WEIGHTS = "model.safetensors"
CHANGED = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A base, and a run on it that trains the head in full."""
  root = tmp_path_factory.mktemp("verify")
  own_text.decoder(root / "base")
  data = own_text.write(root / "data", own_text.chats, 6, 2)
  changes = {"train.steps": 2, "lora.tuned": "lm_head"}
  settings = own_text.shrunk("chat.py", root / "base", data, **changes)
  run.run(settings, root / "run")
  return root


@pytest.fixture
def base(root, tmp_path):
  return shutil.copytree(root / "base", tmp_path / "base")


@pytest.fixture
def adapter(root, tmp_path):
  return shutil.copytree(root / "run" / "adapter", tmp_path / "adapter")


def _changed(file, key, change):
  tensors = load_file(file)
  tensors[key] = change(tensors[key])
  save_file(tensors, file, metadata={"format": "pt"})


def _one(x):
  """The tensor with its last number changed."""
  x = x.clone()
  x.view(-1)[-1] += 0.5
  return x


def _verify(base, adapter):
  return provenance.verify(str(base), adapter)


def test_the_command_says_what_holds_and_peft_reads_the_folder(root, base, adapter):
  arguments = ["--base", str(base), "--adapter", str(adapter)]
  done = commands.run("experiments.cli.main", "verify", *arguments)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("holds: ") == 3
  about = json.loads((adapter / hub_provenance.FILE).read_text())
  assert about["seed"] == 0
  assert about["inputs"].keys() >= {"data.train", "tokenizer"}
  assert {delta["rank"] for delta in about["plan"]["deltas"].values()} == {0, 3}
  # The head is the adapter's own, whatever the base has there.
  assert "lm_head.weight" not in about["base"]["weights"]
  theirs = transformers.LlamaForCausalLM.from_pretrained(base)
  assert hub_peers.load(theirs, adapter) is not None


def test_a_changed_number_of_the_base_is_named(base, adapter):
  _changed(base / WEIGHTS, CHANGED, _one)
  verdict = _verify(base, adapter)
  assert len(verdict.holds) == 1
  weights, logits = verdict.fails
  assert "layers.1.self_attn.q_proj.weight (1 of" in weights
  assert "logits of the probe differ by up to" in logits
  with pytest.raises(
    LoraxError, match=r"other weights.*1 of 20 differ: layers\.1\.self"
  ):
    with_adapter.load(str(base), adapter)
  with_adapter.load(str(base), adapter, other_base=True)
  (adapter / hub_provenance.FILE).unlink()
  with_adapter.load(str(base), adapter)
  with pytest.raises(LoraxError, match=r"has no provenance\.json"):
    _verify(base, adapter)


def test_a_changed_number_of_the_adapter_is_found(base, adapter):
  file = adapter / "adapter_model.safetensors"
  key = next(key for key in load_file(file) if "lora_B" in key)
  _changed(file, key, _one)
  verdict = _verify(base, adapter)
  assert len(verdict.holds) == 1
  assert "adapter_model.safetensors" in verdict.fails[0]
  assert "differ by up to" in verdict.fails[1]


def test_a_base_saved_again_in_other_files_is_the_same(root, adapter, tmp_path):
  model = transformers.LlamaForCausalLM.from_pretrained(root / "base")
  model.save_pretrained(tmp_path / "again", max_shard_size="4KB")
  assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
  assert not _verify(tmp_path / "again", adapter).fails


def test_a_base_in_another_dtype_is_another_and_loads(root, adapter, tmp_path, caplog):
  model = transformers.LlamaForCausalLM.from_pretrained(root / "base")
  model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
  assert "(20 of 20) in another dtype" in _verify(tmp_path / "half", adapter).fails[0]
  with_adapter.load(str(tmp_path / "half"), adapter)
  assert "in another dtype" in caplog.text


def test_a_sample_does_not_read_a_large_weight_in_full(tmp_path, monkeypatch):
  own_text.decoder(tmp_path, width=1024)
  found = registry.stored(tmp_path)
  key = "layers.0.mlp.down_proj.weight"
  rows, count = [], found.reader.shape(found.keys[key])[0]
  read = type(found.reader).part
  monkeypatch.setattr(
    type(found.reader),
    "part",
    lambda self, name, index: (
      rows.append(index[0]) if name.endswith(key) else None,
      read(self, name, index),
    )[1],
  )
  hub_provenance.sampled(found)
  assert 0 < sum(len(range(count)[cut]) for cut in rows) < count / 2
  rows.clear()
  hub_provenance.full(found)
  assert sum(len(range(count)[cut]) for cut in rows) == count


def test_a_run_on_stacked_quantised_layers_is_verified(root, tmp_path):
  changes = {
    "train.steps": 1,
    "model.scan": True,
    "model.quant": "int8",
    "model.dtype": "bfloat16",
    "train.learning_rate": 0.5,
  }
  settings = own_text.shrunk("chat.py", root / "base", root / "data", **changes)
  run.run(settings, tmp_path / "run")
  verdict = _verify(root / "base", tmp_path / "run" / "adapter")
  assert not verdict.fails
  assert len(verdict.holds) == 3
  (tmp_path / "run" / "adapter" / "README.md").write_text("Mine.")
  about = hub_provenance.read(tmp_path / "run" / "adapter")
  about["base"]["quant"] = None
  hub_provenance.write(tmp_path / "run" / "adapter", about)
  assert "logits" in _verify(root / "base", tmp_path / "run" / "adapter").fails[0]
