"""PEFT's folders of every method: read, merged, and written to the same bytes."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from lorax_flax.hub.peft import config_file, soft
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.jobs import warm_start
from tests.hub.peft import peers
from tests.methods import peft_methods
from tests.methods.peft_methods import PEERS

TARGETS = ["query", "intermediate.dense"]


@pytest.fixture(scope="module")
def bert():
  return peers.tiny_classifier("bert")


def adapted(base, name, **fields):
  """A PEFT model, everything that trains made random."""
  peer = PEERS[name]
  given = {"task_type": "SEQ_CLS", "target_modules": TARGETS, **peer.theirs}
  return peers.moved(base, peer.config(**given | peer.in_bert | fields))


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
  form = lx.METHODS[peft_methods.method(name)].peft
  same = ("r", "alpha", *form.options, "bias", "peft_type")
  assert {n: written[n] for n in same if n in written} == {
    n: read[n] for n in same if n in read
  }
  assert written.keys() | {"peft_version"} == read.keys()


@pytest.mark.parametrize("name", ["delora", "loha"])
def test_layers_that_are_stacked_may_have_ranks_of_their_own(name, bert, tmp_path):
  keymap = peers.bert_keymap(bert, scan=True)
  pattern = {"layer.1.attention.self.query": 3, "layer.0.intermediate.dense": 1}
  model = adapted(bert, name, rank_pattern=pattern)
  theirs = peers.save(model, tmp_path / "theirs")
  tree = peers.params(bert, keymap)
  adapter = peers.round_trip(theirs, tmp_path / "ours", tree, keymap)
  merged = peers.params(model.merge_and_unload(), keymap)
  peers.assert_same_leaves(lx.merge(tree, adapter), merged, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["looped", "scanned"])
def test_pruned_ranks_are_read_and_written(scan, bert, tmp_path):
  keymap = peers.bert_keymap(bert, scan)
  model = adapted(bert, "adalora", init_r=3, lora_alpha=6)
  parameters = dict(model.named_parameters())
  names = [n for n in parameters if "lora_E" in n]
  # Of some modules a rank is left out, of one all.
  keep = [[i != n % 3 for i in range(3)] for n in range(len(names) - 1)] + [[False] * 3]
  with torch.no_grad():
    for name, kept in zip(names, keep, strict=True):
      parameters[name][~torch.tensor(kept)] = 0
  pattern = {
    n.removeprefix("base_model.model."): k for n, k in zip(names, keep, strict=True)
  }
  model.peft_config["default"].rank_pattern = pattern
  theirs = peers.save(model, tmp_path / "theirs")
  tree = peers.params(bert, keymap)
  adapter = peers.round_trip(theirs, tmp_path / "ours", tree, keymap)
  merged = peers.params(model.merge_and_unload(), keymap)
  peers.assert_same_leaves(lx.merge(tree, adapter), merged, atol=1e-5)
  read, written = (
    json.loads((tmp_path / folder / peers.CONFIG).read_text())["rank_pattern"]
    for folder in ("theirs", "ours")
  )
  assert written == read
  config = json.loads((theirs / peers.CONFIG).read_text())
  first = next(iter(config["rank_pattern"]))
  config["rank_pattern"][first] = [True]
  (theirs / peers.CONFIG).write_text(json.dumps(config))
  with pytest.raises(lx.LoraxError, match=r"rank_pattern has 1 rows for .*rank is 3"):
    hub_peft.read_adapter(theirs, tree, keymap)


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
    ({"peft_type": "RANDLORA", "save_projection": False}, "save_projection=False chan"),
    ({"peft_type": "VERA", "rank_pattern": {"q": 4}}, "rank_pattern=.*cannot honour"),
    ({"peft_type": "HIRA", "rank_pattern": {"q": 4}}, "rank_pattern=.*change"),
    ({"peft_type": "DELORA", "lambda_pattern": {"q": 4}}, "lambda_pattern=.*change"),
    ({"peft_type": "SUPERTUNING", "r": 4}, "r=4 changes"),
    ({"peft_type": "SUPERTUNING", "save_precomputed_indices": False}, "save_.*changes"),
    ({"peft_type": "DEFT", "decomposition_method": "qr"}, "decomposition_method='qr'"),
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


def test_modules_that_ia3_names_by_default_are_those_of_the_model_type(bert, tmp_path):
  model = peers.moved(bert, peft.IA3Config(task_type="SEQ_CLS"))
  theirs = peers.save(model, tmp_path / "theirs")
  file = theirs / peers.CONFIG
  raw = json.loads(file.read_text())
  file.write_text(
    json.dumps(raw | {"target_modules": None, "feedforward_modules": None})
  )
  keymap = peers.bert_keymap(bert, scan=True)
  tree = peers.params(bert, keymap)
  adapter, config = hub_peft.read_adapter(theirs, tree, keymap)
  assert {path.split("/", 2)[-1] for path in config.options["feedforward"]} == {
    "attention/output/kernel",
    "output/kernel",
  }
  merged = peers.params(model.merge_and_unload(), keymap)
  peers.assert_same_leaves(lx.merge(tree, adapter), merged, atol=1e-5)


def test_layers_that_are_stacked_scale_the_same_side(bert, tmp_path):
  inputs = ["layer.0.output.dense"]
  config = peft.IA3Config(
    target_modules=[*inputs, "output.dense"], feedforward_modules=inputs
  )
  theirs = peers.save(peers.moved(bert, config), tmp_path / "theirs")
  keymap = peers.bert_keymap(bert, scan=True)
  with pytest.raises(lx.LoraxError, match=r"differ in feedforward.*scan=False"):
    hub_peft.read_adapter(theirs, peers.params(bert, keymap), keymap)


@pytest.mark.parametrize("name", ["shira", "supertuning"])
def test_places_outside_of_the_weight_are_refused(name, bert, tmp_path):
  theirs = peers.save(adapted(bert, name), tmp_path / "theirs")
  tensors = load_file(theirs / peers.WEIGHTS)
  key = next(key for key in tensors if key.endswith(f"{name}_indices"))
  tensors[key].flat[0] = 99_999
  save_file(tensors, theirs / peers.WEIGHTS)
  keymap = peers.bert_keymap(bert)
  with pytest.raises(lx.LoraxError, match="holds places outside of a weight of shape"):
    hub_peft.read_adapter(theirs, peers.params(bert, keymap), keymap)


def test_the_copies_of_what_all_modules_share_are_equal(bert, tmp_path):
  theirs = peers.save(adapted(bert, "randlora"), tmp_path / "theirs")
  tensors = load_file(theirs / peers.WEIGHTS)
  key = next(key for key in tensors if key.endswith("randlora_A"))
  save_file(tensors | {key: tensors[key] + 1}, theirs / peers.WEIGHTS)
  keymap = peers.bert_keymap(bert)
  with pytest.raises(lx.LoraxError, match="randlora_A differs from another tensor"):
    hub_peft.read_adapter(theirs, peers.params(bert, keymap), keymap)


@pytest.mark.parametrize("scan", [False, True], ids=["looped", "scanned"])
def test_logits_of_which_the_largest_are_saved_are_read_and_not_trained(
  scan, bert, tmp_path
):
  keymap = peers.bert_keymap(bert, scan)
  model = adapted(bert, "vblora", save_only_topk_weights=True)
  theirs = peers.save(model, tmp_path / "theirs")
  keys = load_file(theirs / peers.WEIGHTS).keys()
  assert any(key.endswith("vblora_logits_A_topk_indices") for key in keys)
  tree = peers.params(bert, keymap)
  adapter, config = hub_peft.read_adapter(theirs, tree, keymap)
  merged = peers.params(model.merge_and_unload(), keymap)
  peers.assert_same_leaves(lx.merge(tree, adapter), merged, atol=1e-5)
  # What is written has the logits, of which PEFT makes the same.
  peft_folder = tmp_path / "ours"
  hub_peft.write_adapter(peft_folder, adapter, keymap, config)
  again = peers.params(peers.load(bert, peft_folder).merge_and_unload(), keymap)
  peers.assert_same_leaves(again, merged, atol=1e-5)
  path, delta = next((p, d) for p, d in adapter.items() if d.common)
  with pytest.raises(lx.LoraxError, match=f"{path}.*can be applied .*not trained on"):
    warm_start._with_trained(path, delta, delta)
  tensors = load_file(theirs / peers.WEIGHTS)
  key = next(key for key in tensors if key.endswith("_topk_indices"))
  save_file(tensors | {key: tensors[key] + 9}, theirs / peers.WEIGHTS)
  with pytest.raises(lx.LoraxError, match="_topk_indices are from 0 to 4, and there"):
    hub_peft.read_adapter(theirs, tree, keymap)


def test_every_type_of_peft_is_read_or_has_a_reason():
  text = (Path(__file__).parents[3] / "PEFT_COVERAGE.md").read_text()
  parts = [part.split("\n## ")[0] for part in text.split("\n## Types that are ")[1:]]
  first = [re.findall(r"^\|([^|]*)\|", part, re.MULTILINE) for part in parts]
  read, left = ({*re.findall(r"`(\w+)`", " ".join(cells))} for cells in first)
  methods = {m.peft.type for m in lx.METHODS.values() if m.peft}
  alone = {m.alone.type for m in lx.METHODS.values() if m.alone}
  assert read == methods | alone | {*soft.FORMS}
  assert read | left == {each.value for each in peft.PeftType}
  assert not read & left


ALONE = {
  "LN_TUNING": peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
  "some norms": peft.LNTuningConfig(
    target_modules=["0.output.LayerNorm", "embeddings.LayerNorm"]
  ),
  "TRAINABLE_TOKENS": peft.TrainableTokensConfig(
    token_indices=[3, 5], task_type="SEQ_CLS"
  ),
}


@pytest.mark.parametrize("scan", [False, True], ids=["looped", "scanned"])
@pytest.mark.parametrize("name", ALONE)
def test_types_in_which_no_kernel_has_a_delta(name, scan, bert, tmp_path):
  keymap = peers.bert_keymap(bert, scan)
  model = peers.moved(bert, ALONE[name])
  theirs = peers.save(model, tmp_path / "theirs")
  tree = peers.params(bert, keymap)
  adapter = peers.round_trip(theirs, tmp_path / "ours", tree, keymap)
  with torch.no_grad():
    want = peers.bert_logits(model)
    torch.testing.assert_close(
      peers.bert_logits(peers.load(bert, tmp_path / "ours")), want
    )
    assert not torch.allclose(want, peers.bert_logits(bert), atol=1e-3)
  unloaded = model.merge_and_unload()
  if hasattr(unloaded.classifier, "modules_to_save"):  # which LN_TUNING leaves there
    unloaded.classifier = unloaded.classifier.modules_to_save["default"]
  merged = peers.params(unloaded, keymap)
  peers.assert_same_leaves(lx.merge(tree, adapter), merged, atol=1e-6)
  written, read = (
    json.loads((folder / peers.CONFIG).read_text())
    for folder in (tmp_path / "ours", theirs)
  )
  assert written["peft_type"] == read["peft_type"]
  assert written.keys() | {"peft_version"} == read.keys()


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (peft.LNTuningConfig(target_modules=["query"]), "read here for norms.*is a linear"),
    (peft.LNTuningConfig(target_modules=["LayerNrom"]), "did you mean|nearest"),
  ],
)
def test_what_a_type_of_norms_does_not_mean_is_refused(config, message, bert):
  raw = config.to_dict() | {"target_modules": [*config.target_modules]}
  with pytest.raises(lx.LoraxError, match=message):
    hub_peft.from_peft(raw, peers.bert_keymap(bert))
