"""PEFT's folders of every method: read, merged, and written to the same bytes."""

import json

import pytest
import torch

import lorax_flax as lx
from lorax_flax.hub.peft import config_file
from tests.hub.peft import peers
from tests.methods.peft_methods import PEERS

pytestmark = pytest.mark.usefixtures("quick_to_compile")
TARGETS = ["query", "intermediate.dense"]


@pytest.fixture(scope="module")
def bert():
  return peers.tiny_classifier("bert")


def adapted(base, name, **fields):
  """A PEFT model, everything that trains made random."""
  peer = PEERS[name]
  given = {"task_type": "SEQ_CLS", "target_modules": TARGETS, **peer.theirs, **fields}
  return peers.moved(base, peer.config(**given))


@pytest.mark.parametrize("scan", [False, True], ids=["looped", "scanned"])
@pytest.mark.parametrize("name", PEERS)
def test_a_folder_is_read_merged_and_written_as_peft_does(name, scan, bert, tmp_path):
  keymap = peers.bert_keymap(bert, scan)
  model = adapted(bert, name)
  theirs = peers.save(model, tmp_path / "theirs")
  tree = peers.params(bert, keymap)
  adapter = peers.round_trip(theirs, tmp_path / "ours", tree, keymap)
  with torch.no_grad():
    want = peers.bert_logits(model)
    again = peers.bert_logits(peers.load(bert, tmp_path / "ours"))
    assert not torch.allclose(want, peers.bert_logits(bert), atol=1e-3)
    torch.testing.assert_close(again, want)
  merged = peers.params(model.merge_and_unload(), keymap)
  peers.assert_same_leaves(lx.merge(tree, adapter), merged, atol=1e-5)
  written, read = (
    json.loads((folder / peers.CONFIG).read_text())
    for folder in (tmp_path / "ours", theirs)
  )
  same = ("r", "alpha", *lx.METHODS[name].peft.options, "bias", "peft_type")
  assert {n: written[n] for n in same if n in written} == {
    n: read[n] for n in same if n in read
  }
  assert written.keys() | {"peft_version"} == read.keys()


@pytest.mark.parametrize(
  ("raw", "message"),
  [
    ({"peft_type": "ADALROA"}, "unknown peft_type 'ADALROA'"),
    ({"peft_type": "VERA", "save_projection": False}, "save_projection=False changes"),
    ({"peft_type": "HRA", "apply_GS": True}, "apply_GS=True changes"),
    ({"peft_type": "GRALORA", "hybrid_r": 4}, "hybrid_r=4 changes"),
    ({"peft_type": "MISS", "init_weights": "bat"}, "init_weights='bat' changes"),
    (
      {"peft_type": "C3A", "block_size_pattern": {"q": 4}},
      "block_size_pattern=.*chang",
    ),
    ({"peft_type": "OFT", "peft_version": "0.17.1"}, "something else before 0.18"),
    ({"peft_type": "VERA", "bias": "lora_only"}, "bias='lora_only' is not what PEFT"),
    ({"peft_type": "VERA", "rank_pattern": {"q": 4}}, "rank_pattern=.*cannot honour"),
  ],
)
def test_what_is_not_computed_is_refused_by_name(raw, message):
  with pytest.raises(lx.LoraxError, match=message):
    config_file.parse(raw)


def test_a_start_that_differs_from_ours_is_refused_for_training_alone():
  raw = {"peft_type": "C3A", "init_weights": "xavier_uniform", "block_size": 4}
  assert config_file.parse(raw).options == {"block_size": 4}
  with pytest.raises(lx.LoraxError, match="init_weights='xavier_uniform'"):
    config_file.parse(raw, fresh=True)


def test_biases_of_the_targets_have_the_types_own_name():
  read = config_file.parse({"peft_type": "FOURIERFT", "bias": "fourier_only"})
  assert read.bias == "lora_only"
