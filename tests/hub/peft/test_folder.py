"""PEFT folders of encoders against peft itself: read, written, round the circle."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry
from tests.hub.peft import peers
from tests.hub.peft.peers import LAYERS

FAMILIES = ("bert", "roberta")
QUERY_VALUE = {"target_modules": ["query", "value"]}
CASES = {
  "query and value": QUERY_VALUE,
  "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
  "regex": {"target_modules": r".*layer\.[02]\..*(key|intermediate\.dense)"},
  "one whole name": {
    "target_modules": ["encoder.layer.1.attention.output.dense", "key"],
  },
  "embedding": {"target_modules": ["word_embeddings", "query"]},
  "rank_pattern": {
    **QUERY_VALUE,
    "rank_pattern": {"value": 5, r"layer\.1\.attention.self.query": 2},
  },
  "alpha_pattern": {
    **QUERY_VALUE,
    "alpha_pattern": {"layer.1.attention.self.value": 3.5, "query": 16},
    "rank_pattern": {"query": 6},
  },
  "rslora": {**QUERY_VALUE, "use_rslora": True, "r": 5, "rank_pattern": {"query": 3}},
  "layers_to_transform": {**QUERY_VALUE, "layers_to_transform": [0, 2]},
  "one layer": {
    **QUERY_VALUE,
    "layers_to_transform": 1,
    "layers_pattern": "layer",
  },
  "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["key"]},
  "bias all": {**QUERY_VALUE, "bias": "all"},
  "bias lora_only": {
    **QUERY_VALUE,
    "bias": "lora_only",
    "layers_to_transform": [1, 2],
  },
  "modules_to_save": {**QUERY_VALUE, "modules_to_save": ["word_embeddings"]},
  "a norm saved": {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
  "head frozen": {**QUERY_VALUE, "task_type": None},
  "gaussian": {**QUERY_VALUE, "init_lora_weights": "gaussian", "lora_dropout": 0.25},
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
  return peers.tiny_classifier(request.param)


@pytest.fixture(scope="module")
def bert():
  return peers.tiny_classifier("bert")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
  """By case: peft's folder, its logits, and the base with peft's deltas merged."""
  made = {}

  def save(case):
    if case not in made:
      model = peers.adapted(base, **{"task_type": "SEQ_CLS", **CASES[case]})
      folder = peers.save(model, tmp_path_factory.mktemp("peft") / "theirs")
      with torch.no_grad():
        logits = peers.bert_logits(model)
      made[case] = folder, logits, model.merge_and_unload()
    return made[case]

  return save


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_merges_to_what_peft_merges_and_comes_back(
  base, saved, case, scan, tmp_path
):
  theirs, logits, merged = saved(case)
  keymap = peers.bert_keymap(base, scan)
  params = peers.params(base, keymap)
  adapter = peers.round_trip(theirs, tmp_path / "ours", params, keymap)
  peers.assert_same_leaves(lx.merge(params, adapter), peers.params(merged, keymap))
  assert all(
    (np.asarray(x) != np.asarray(y)).any()
    for x, y in peers.pairs(lx.merge(params, adapter), params, adapter)
  ), "a delta that changes nothing"
  if not scan:  # the same bytes, loaded once
    with torch.no_grad():
      loaded = peers.bert_logits(peers.load(base, tmp_path / "ours"))
    torch.testing.assert_close(loaded, logits)


def test_the_config_is_written_as_peft_writes_it(base, tmp_path):
  model = peers.adapted(base, task_type="SEQ_CLS", **QUERY_VALUE)
  theirs, ours = peers.save(model, tmp_path / "theirs"), tmp_path / "ours"
  keymap = peers.bert_keymap(base)
  adapter, config = hub_peft.read_adapter(theirs, peers.params(base, keymap), keymap)
  hub_peft.write_adapter(
    ours, adapter, keymap, config, base_name="some/base", revision="main"
  )
  text = (ours / "adapter_config.json").read_text()
  raw = json.loads(text)
  assert text == json.dumps(raw, indent=2, sort_keys=True)
  wanted = json.loads((theirs / "adapter_config.json").read_text())
  assert wanted.pop("peft_version")
  wanted |= {"base_model_name_or_path": "some/base", "revision": "main"}
  for each in (raw, wanted):
    each["target_modules"] = sorted(each["target_modules"])
  assert raw == wanted
  with open(ours / "adapter_model.safetensors", "rb") as file:
    header = file.read(int.from_bytes(file.read(8), "little"))
  assert json.loads(header)["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_of_ours_loads_in_peft_to_the_same_weights(base, scan, tmp_path):
  keymap = peers.bert_keymap(base, scan)
  params = peers.params(base, keymap)
  config = lx.LoraConfig(
    targets=r".*/(query|intermediate|word_embeddings)/(kernel|embedding)",
    rank=3,
    alpha=5.0,
    rank_pattern={"intermediate": 2},
    tuned=("classifier",),
  )
  adapter = peers.toy(keymap, params, config)
  hub_peft.write_adapter(tmp_path / "out", adapter, keymap, config)
  merged = peers.load(base, tmp_path / "out").merge_and_unload()
  peers.assert_same_leaves(lx.merge(params, adapter), peers.params(merged, keymap))


def test_the_shortest_names_that_mean_the_targets_are_written(base, tmp_path):
  keymap = peers.bert_keymap(base)
  params = peers.params(base, keymap)
  for targets, names in {
    r".*/(query|value)/kernel": ["query", "value"],
    r".*attention/output/kernel": ["attention.output.dense"],
    r".*layer_1/attention/key/kernel": ["1.attention.self.key"],
  }.items():
    config = lx.LoraConfig(targets=targets, tuned=("classifier",))
    adapter = peers.toy(keymap, params, config)
    hub_peft.write_adapter(tmp_path / "out", adapter, keymap, config)
    raw = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert raw["target_modules"] == names


def test_layers_of_unequal_rank_are_stacked_with_zeros_beneath(base, tmp_path):
  model = peers.adapted(base, task_type="SEQ_CLS", **CASES["rank_pattern"])
  folder = peers.save(model, tmp_path / "peft")
  keymap = peers.bert_keymap(base, scan=True)
  adapter, _ = hub_peft.read_adapter(folder, peers.params(base, keymap), keymap)
  delta = adapter["encoder/layers/attention/query/kernel"]
  assert delta.a.shape == (LAYERS, 16, 4)
  assert delta.scale.shape == (LAYERS,)
  assert not delta.a[1, :, 2:].any()
  assert not delta.b[1, 2:].any()
  assert adapter["encoder/layers/attention/value/kernel"].scale.shape == ()


def test_layers_left_out_of_a_stack_are_named(base, tmp_path):
  folder = peers.save(
    peers.adapted(base, task_type="SEQ_CLS", **CASES["layers_to_transform"]),
    tmp_path / "peft",
  )
  keymap = peers.bert_keymap(base, scan=True)
  adapter, config = hub_peft.read_adapter(folder, peers.params(base, keymap), keymap)
  delta = adapter["encoder/layers/attention/query/kernel"]
  assert delta.layers == (0, 2)
  assert delta.a.shape[0] == 2
  assert set(config.rank_pattern.values()) == {(4, 0, 4)}


@pytest.mark.parametrize(
  ("case", "scan"),
  [
    *itertools.product(["all-linear", "rslora", "layers_to_transform"], [False, True]),
    ("alpha_pattern", True),
    ("bias lora_only", True),
  ],
)
def test_the_config_read_starts_the_same_adapter_in_adapt(bert, case, scan, tmp_path):
  folder = peers.save(
    peers.adapted(bert, task_type="SEQ_CLS", **CASES[case]), tmp_path / "peft"
  )
  bert.save_pretrained(tmp_path / "base")
  loaded = registry.load(tmp_path / "base", scan=scan)
  found, config = hub_peft.read_adapter(folder, loaded.params, loaded.keymap)
  lora = lx.adapt(lambda p, x: loaded.module.apply({"params": p}, x, x), config)
  x = jnp.ones((1, 4), jnp.int32)
  started = lora.init(jax.random.key(0), loaded.params, x)
  assert started.keys() == found.keys()
  describe = lambda x: (x.shape, x.dtype)
  assert jax.tree.map(describe, started) == jax.tree.map(describe, found)
  for path, delta in found.items():
    if isinstance(delta, lx.LoRA):
      np.testing.assert_allclose(started[path].scale, delta.scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_as_float32_and_written_as_it_was(bert, dtype, tmp_path):
  model = peers.adapted(bert, task_type="SEQ_CLS", **QUERY_VALUE)
  folder = peers.save(model, tmp_path / "peft")
  keymap = peers.bert_keymap(bert)
  params = peers.params(bert, keymap)
  file = folder / peers.WEIGHTS
  full = load_file(file)
  half = {k: v if "lora_B" in k else v.astype(dtype) for k, v in full.items()}
  save_file(half, file, metadata={"format": "pt"})
  adapter = peers.round_trip(folder, tmp_path / "ours", params, keymap)
  delta = adapter["encoder/layer_0/attention/query/kernel"]
  key = "encoder.layer.0.attention.self.query.lora_A.weight"
  (stored,) = (v for k, v in full.items() if k.endswith(key))
  assert delta.a.dtype == jnp.float32
  np.testing.assert_array_equal(delta.a.T, stored.astype(dtype))


def test_one_dtype_may_be_asked_for_all_tensors(bert, tmp_path):
  keymap = peers.bert_keymap(bert)
  config = lx.LoraConfig(targets=r".*/query/kernel", tuned=("classifier",))
  adapter = peers.toy(keymap, peers.params(bert, keymap), config)
  hub_peft.write_adapter(tmp_path / "out", adapter, keymap, config, dtypes="bfloat16")
  stored = set(hub_peft.stored_dtypes(tmp_path / "out").values())
  assert stored == {"bfloat16"}


def test_to_peft_and_from_peft_are_inverse(bert, tmp_path):
  bert.save_pretrained(tmp_path)
  loaded = registry.load(tmp_path, scan=True)
  path = "encoder/layers/attention/query/kernel"
  config = lx.LoraConfig(
    targets=(path,),
    rank=3,
    alpha=5,
    rank_pattern={path: (3, 0, 2)},
    tuned=("classifier/bias", "classifier/kernel"),
  )
  lora = lx.adapt(lambda p, x: loaded.module.apply({"params": p}, x, x), config)
  adapter = lora.init(jax.random.key(0), loaded.params, jnp.ones((1, 4), jnp.int32))
  raw = hub_peft.to_peft(config, adapter, loaded.keymap)
  assert raw["target_modules"] == [
    "0.attention.self.query",
    "2.attention.self.query",
  ]
  assert raw["rank_pattern"] == {"2.attention.self.query": 2}
  assert hub_peft.from_peft(raw, loaded.keymap) == config


def test_an_adapter_of_the_model_without_a_head_has_names_without_a_prefix(
  bert, tmp_path
):
  body = bert.bert
  theirs = peers.save(
    peers.adapted(body, task_type="FEATURE_EXTRACTION", target_modules="all-linear"),
    tmp_path / "theirs",
  )
  assert all(".bert." not in key for key in load_file(theirs / peers.WEIGHTS))
  keymap = peers.bert_keymap(bert, scan=True)
  params = peers.params(bert, keymap)
  adapter = peers.round_trip(theirs, tmp_path / "ours", params, keymap)
  assert "encoder/layers/attention/key/kernel" in adapter
  assert "pooler/kernel" in adapter
  peers.load(body, tmp_path / "ours")


def test_labels_are_kept_and_peft_passes_over_them(base, tmp_path):
  keymap = peers.bert_keymap(base)
  config = lx.LoraConfig(targets=r".*/query/kernel", tuned=("classifier",))
  adapter = peers.toy(keymap, peers.params(base, keymap), config)
  folder = tmp_path / "out"
  hub_peft.write_adapter(folder, adapter, keymap, config, labels=["no", "maybe", "yes"])
  assert hub_peft.read_labels(folder) == (["no", "maybe", "yes"], None)
  assert hub_peft.needs(folder, keymap).num_labels == 3
  peers.load(base, folder)
  hub_peft.write_adapter(folder, adapter, keymap, config)
  assert hub_peft.read_labels(folder) == (None, None)
