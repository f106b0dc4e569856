"""Key maps against transformers' own names."""

import pytest
import torch
import transformers

import lorax_flax as lx
from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.models.bert import keys as bert_keys
from tests.models import peers

PEERS = {
  "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
  "roberta": (
    transformers.RobertaConfig,
    transformers.RobertaForSequenceClassification,
  ),
  "xlm-roberta": (
    transformers.XLMRobertaConfig,
    transformers.XLMRobertaForSequenceClassification,
  ),
}
LAYERS = peers.SIZES["num_hidden_layers"]
ANCHOR = "embeddings.word_embeddings.weight"


def torch_model(family):
  config_type, model_type = PEERS[family]
  return model_type(config_type(**peers.SIZES))


@pytest.mark.parametrize("family", PEERS)
def test_full_keys_are_exactly_those_of_transformers(family):
  keymap = bert_keys.keymap(family, LAYERS)
  full = [km.full_key(keymap, bare) for bare in keymap.sites]
  assert sorted(full) == sorted(torch_model(family).state_dict())


@pytest.mark.parametrize("family", PEERS)
def test_modules_and_their_kinds_are_those_of_torch(family):
  kinds = {
    torch.nn.Linear: "linear",
    torch.nn.Embedding: "embedding",
    torch.nn.LayerNorm: "norm",
  }
  want = {
    name: kinds[type(module)]
    for name, module in torch_model(family).named_modules()
    if type(module) in kinds
  }
  assert km.modules(bert_keys.keymap(family, LAYERS)) == want


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", PEERS)
def test_translation_there_and_back_is_the_identity(family, scan):
  keymap = bert_keys.keymap(family, LAYERS, scan)
  seen = []
  for path in keymap.keys:
    for layer, key in enumerate(km.path_to_keys(keymap, path)):
      stacked = "/layers/" in path
      assert km.key_to_path(keymap, key) == (path, layer if stacked else None)
      seen.append(key)
  assert len(seen) == len(set(seen)) == len(keymap.sites)
  for name in km.modules(keymap):
    path, layer = km.module_to_path(keymap, name)
    assert km.path_to_modules(keymap, path)[layer or 0] == name


def test_a_stacked_path_stands_for_one_module_a_layer():
  keymap = bert_keys.keymap("bert", 2, scan=True)
  path = "encoder/layers/attention/query/kernel"
  assert km.path_to_modules(keymap, path) == [
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.1.attention.self.query",
  ]
  assert km.module_to_path(keymap, "encoder.layer.1.attention.self.query") == (path, 1)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda k: km.module_to_path(k, "bert.pooler.dnse"), "did you mean 'bert.pooler"),
    (lambda k: km.key_to_path(k, "bert.pooler.dense.wight"), "dense.weight"),
    (lambda k: km.path_to_keys(k, "pooler/kernl"), "did you mean 'pooler/kernel'"),
  ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(call, message):
  with pytest.raises(lx.LoraxError, match=message):
    call(bert_keys.keymap("bert", 2))


def test_an_unknown_family_is_an_error():
  with pytest.raises(lx.LoraxError, match="did you mean 'roberta'"):
    bert_keys.keymap("robertta", 2)


@pytest.mark.parametrize(
  ("body", "head"),
  [
    ("", ""),
    ("bert.", ""),
    ("model.", ""),
    ("model.", "model."),
    ("module.bert.", "module."),
  ],
)
def test_whatever_the_stored_prefix_the_bare_keys_are_found(body, head):
  keymap = bert_keys.keymap("bert", 1)
  stored = {
    bare: (body if site.entry.part == "body" else head) + bare
    for bare, site in keymap.sites.items()
  }
  assert km.bare_keys(keymap, stored.values()) == stored


def test_old_names_of_a_norm_are_read():
  keymap = bert_keys.keymap("bert", 1)
  old = "bert.embeddings.LayerNorm.gamma"
  bare = km.bare_keys(keymap, [f"bert.{ANCHOR}", old])
  assert bare["embeddings.LayerNorm.weight"] == old


@pytest.mark.parametrize(
  ("stored", "message"),
  [
    ([f"a.{ANCHOR}", f"b.{ANCHOR}"], "more than one bert model"),
    (
      [ANCHOR, "embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"],
      "'embeddings.LayerNorm.weight' twice",
    ),
    (["transformer.wte.weight"], "missing key.*transformer.wte.weight"),
    (["my" + ANCHOR], "missing key"),
  ],
)
def test_ambiguous_or_foreign_keys_are_an_error(stored, message):
  with pytest.raises(lx.LoraxError, match=message):
    km.bare_keys(bert_keys.keymap("bert", 1), stored)
