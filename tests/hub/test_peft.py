"""PEFT folders against peft itself: read, written, round the circle, and damaged."""

import copy
import itertools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError
from lorax_flax.hub import bert_keys, peft_config
from lorax_flax.hub import peft as hub_peft
from lorax_flax.hub.keymap import full_key
from lorax_flax.hub.peft_layout import module_names
from lorax_flax.models import registry

FAMILIES = ("bert", "roberta")
LAYERS = 3
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


def _tiny(family):
  """A tiny random sequence classifier in torch."""
  torch.manual_seed(0)
  config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}
  model = {
    "bert": transformers.BertForSequenceClassification,
    "roberta": transformers.RobertaForSequenceClassification,
  }
  sizes = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "num_labels": 3,
    "initializer_range": 0.3,
  }
  tiny = model[family](config[family](**sizes)).eval()
  with torch.no_grad():
    for parameter in tiny.parameters():
      parameter.add_(torch.randn_like(parameter) * 0.1)  # biases start as zeros
  return tiny


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
  return _tiny(request.param)


@pytest.fixture(scope="module")
def bert():
  return _tiny("bert")


def _family(base):
  return base.config.model_type


def _adapted(base, **kwargs):
  """A PEFT model on a copy of the base, everything that trains made random."""
  torch.manual_seed(1)
  config = peft.LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, **kwargs})
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(copy.deepcopy(base), config)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(torch.randn_like(parameter) * 0.2)
  return model.eval()


def _save(model, folder):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model.save_pretrained(folder)
  return folder


def _load(base, folder):
  """What peft makes of a folder; a key that it didn't find or know is a warning."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def _keymap(base, scan=False):
  return bert_keys.keymap(_family(base), LAYERS, scan)


def _params(model, keymap):
  """Our tree of a torch model's weights, by the key map, without our loader."""
  stored = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  leaves = {}
  for bare, site in keymap.sites.items():
    value = stored[full_key(keymap, bare)]
    leaves.setdefault(site.path, []).append(site.entry.to_ours(value))
  tree = {}
  for path, values in leaves.items():
    node = tree
    *parents, name = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    stacked = keymap.scan and "/layers/" in path
    node[name] = jnp.asarray(np.stack(values) if stacked else values[0])
  return tree


def _merged(params, adapter):
  """The arithmetic of merging, in numpy; `lx.merge` has tests of its own."""
  leaves = {path: np.array(leaf) for path, leaf in flatten(params).items()}
  for path, delta in adapter.items():
    if isinstance(delta, lx.Tuned):
      leaves[path] = np.asarray(delta.value)
      continue
    a, b = np.asarray(delta.a, np.float64), np.asarray(delta.b, np.float64)
    scale = np.reshape(delta.scale, (-1, 1, 1) if np.ndim(delta.scale) else ())
    layers = slice(None) if delta.layers is None else list(delta.layers)
    leaves[path][layers] += scale * (a @ b)
  return leaves


def _logits(model):
  ids = torch.arange(2 * 7).reshape(2, 7) % 38 + 2
  mask = torch.ones_like(ids)
  mask[1, 4:] = 0
  with torch.no_grad():
    return model(input_ids=ids, attention_mask=mask).logits.numpy()


def _assert_same_leaves(got, wanted):
  wanted = flatten(wanted)
  assert got.keys() == wanted.keys()
  for path, leaf in wanted.items():
    np.testing.assert_allclose(got[path], leaf, atol=2e-6, rtol=1e-5, err_msg=path)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
  """By case: peft's folder, its logits, and the base with peft's deltas merged."""
  made = {}

  def save(case):
    if case not in made:
      model = _adapted(base, **CASES[case])
      folder = _save(model, tmp_path_factory.mktemp("peft") / "theirs")
      made[case] = folder, _logits(model), model.merge_and_unload()
    return made[case]

  return save


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_merges_to_what_peft_merges(base, saved, case, scan):
  folder, _, theirs = saved(case)
  keymap = _keymap(base, scan)
  params = _params(base, keymap)
  adapter, _ = hub_peft.read_adapter(folder, params, keymap)
  merged = _merged(params, adapter)
  _assert_same_leaves(merged, _params(theirs, keymap))
  moved = [p for p, leaf in flatten(params).items() if (leaf != merged[p]).any()]
  assert sorted(moved) == sorted(adapter), "a delta that changes nothing, or too much"


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_read_then_written_is_byte_equal_and_means_the_same(
  base, saved, case, scan, tmp_path
):
  theirs, logits, _ = saved(case)
  ours = tmp_path / "ours"
  keymap = _keymap(base, scan)
  adapter, config = hub_peft.read_adapter(theirs, _params(base, keymap), keymap)
  before = peft_config.read_config(theirs)
  hub_peft.write_adapter(ours, adapter, keymap, config, task_type=before.task_type)

  wanted = load_file(theirs / "adapter_model.safetensors")
  got = load_file(ours / "adapter_model.safetensors")
  assert got.keys() == wanted.keys()
  for key, value in wanted.items():
    assert got[key].dtype == value.dtype
    assert got[key].tobytes() == value.tobytes(), key

  after = peft_config.read_config(ours)
  names = module_names(keymap)
  linear = [n for n in names if n.endswith(("dense", "query", "key", "value"))]
  targets = before.targets(linear, names)
  assert after.targets(linear, names) == targets
  assert [*map(after.rank, targets)] == [*map(before.rank, targets)]
  assert [*map(after.scale, targets)] == [*map(before.scale, targets)]
  assert set(after.saved(names)) == set(before.saved(names))
  for field in ("bias", "use_rslora", "lora_dropout", "task_type", "init_lora_weights"):
    assert getattr(after, field) == getattr(before, field)
  if not scan:  # the same bytes, loaded once
    np.testing.assert_array_equal(_logits(_load(base, ours)), logits)


def test_the_config_is_written_as_peft_writes_it(base, tmp_path):
  model = _adapted(base, **QUERY_VALUE)
  theirs, ours = _save(model, tmp_path / "theirs"), tmp_path / "ours"
  keymap = _keymap(base)
  adapter, config = hub_peft.read_adapter(theirs, _params(base, keymap), keymap)
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


def _toy(keymap, params, config, noise=0.1):
  """An adapter as `init` would start it, moved off zero; no model needed."""
  rng = np.random.default_rng(0)
  leaves = flatten(params)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * noise, jnp.float32)
  adapter = {}
  for path, leaf in leaves.items():
    if re.fullmatch(config.targets, path):
      *stack, fan_in, fan_out = leaf.shape
      rank = next((r for p, r in config.rank_pattern.items() if p in path), config.rank)
      roles = (*["stack"] * len(stack), "in", "out")
      a, b = draw(*stack, fan_in, rank), draw(*stack, rank, fan_out)
      adapter[path] = lx.LoRA(a, b, jnp.float32(config.alpha / rank), roles)
    elif path.split("/")[0] in config.tuned:
      adapter[path] = lx.Tuned(leaf + draw(*leaf.shape), leaf)
  return adapter


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_of_ours_loads_in_peft_to_the_same_weights(base, scan, tmp_path):
  keymap = _keymap(base, scan)
  params = _params(base, keymap)
  config = lx.LoraConfig(
    targets=r".*/(query|intermediate|word_embeddings)/(kernel|embedding)",
    rank=3,
    alpha=5.0,
    rank_pattern={"intermediate": 2},
    tuned=("classifier",),
  )
  adapter = _toy(keymap, params, config)
  hub_peft.write_adapter(tmp_path / "out", adapter, keymap, config)
  merged = _load(base, tmp_path / "out").merge_and_unload()
  _assert_same_leaves(_merged(params, adapter), _params(merged, keymap))
  assert (_logits(merged) != _logits(base)).all()


def test_the_shortest_names_that_mean_the_targets_are_written(base, tmp_path):
  keymap = _keymap(base)
  params = _params(base, keymap)
  for targets, names in {
    r".*/(query|value)/kernel": ["query", "value"],
    r".*attention/output/kernel": ["attention.output.dense"],
    r".*layer_1/attention/key/kernel": ["1.attention.self.key"],
  }.items():
    config = lx.LoraConfig(targets=targets, tuned=("classifier",))
    adapter = _toy(keymap, params, config)
    hub_peft.write_adapter(tmp_path / "out", adapter, keymap, config)
    raw = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert raw["target_modules"] == names


def test_layers_of_unequal_rank_are_stacked_with_zeros_beneath(base, tmp_path):
  model = _adapted(base, **CASES["rank_pattern"])
  folder = _save(model, tmp_path / "peft")
  keymap = _keymap(base, scan=True)
  adapter, _ = hub_peft.read_adapter(folder, _params(base, keymap), keymap)
  delta = adapter["encoder/layers/attention/query/kernel"]
  assert delta.a.shape == (LAYERS, 16, 4)
  assert delta.scale.shape == (LAYERS,)
  assert not delta.a[1, :, 2:].any()
  assert not delta.b[1, 2:].any()
  assert adapter["encoder/layers/attention/value/kernel"].scale.shape == ()


def test_layers_left_out_of_a_stack_are_named(base, tmp_path):
  folder = _save(_adapted(base, **CASES["layers_to_transform"]), tmp_path / "peft")
  keymap = _keymap(base, scan=True)
  adapter, config = hub_peft.read_adapter(folder, _params(base, keymap), keymap)
  delta = adapter["encoder/layers/attention/query/kernel"]
  assert delta.layers == (0, 2)
  assert delta.a.shape[0] == 2
  assert config.layers == (0, 2)


@pytest.mark.parametrize(
  ("case", "scan"),
  [
    *itertools.product(["all-linear", "rslora", "layers_to_transform"], [False, True]),
    # A config has one alpha for a stacked leaf, where the deltas have one a layer.
    ("alpha_pattern", False),
    ("bias lora_only", False),
  ],
)
def test_the_config_read_starts_the_same_adapter_in_adapt(bert, case, scan, tmp_path):
  folder = _save(_adapted(bert, **CASES[case]), tmp_path / "peft")
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


def test_half_precision_factors_are_read_as_float32(base, tmp_path):
  folder = _save(_adapted(base, **QUERY_VALUE), tmp_path / "peft")
  keymap = _keymap(base)
  file = folder / "adapter_model.safetensors"
  full = load_file(file)
  save_file({k: v.astype(jnp.bfloat16) for k, v in full.items()}, file)
  adapter, _ = hub_peft.read_adapter(folder, _params(base, keymap), keymap)
  delta = adapter["encoder/layer_0/attention/query/kernel"]
  key = "encoder.layer.0.attention.self.query.lora_A.weight"
  (stored,) = (v for k, v in full.items() if k.endswith(key))
  assert delta.a.dtype == jnp.float32
  np.testing.assert_array_equal(delta.a.T, stored.astype(jnp.bfloat16))


def test_labels_are_kept_and_peft_passes_over_them(base, tmp_path):
  keymap = _keymap(base)
  config = lx.LoraConfig(targets=r".*/query/kernel", tuned=("classifier",))
  adapter = _toy(keymap, _params(base, keymap), config)
  folder = tmp_path / "out"
  hub_peft.write_adapter(folder, adapter, keymap, config, labels=["no", "maybe", "yes"])
  assert hub_peft.read_labels(folder) == ["no", "maybe", "yes"]
  assert hub_peft.num_labels(folder) == 3
  _load(base, folder)
  hub_peft.write_adapter(folder, adapter, keymap, config)
  assert hub_peft.read_labels(folder) is None


# What goes wrong.


@pytest.fixture
def folder(bert, tmp_path):
  return _save(_adapted(bert, **QUERY_VALUE), tmp_path / "peft")


def _read(bert, folder):
  keymap = _keymap(bert)
  return hub_peft.read_adapter(folder, _params(bert, keymap), keymap)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("use_dora", True),
    ("layer_replication", [[0, 1]]),
    ("lora_bias", True),
    ("target_parameters", ["experts.down_proj"]),
    ("trainable_token_indices", [1]),
    ("megatron_config", {"a": 1}),
    ("init_lora_weights", "pissa_niter_4"),
    ("peft_type", "VERA"),
    ("peft_type", None),
    ("a_field_of_the_future", "on"),
    ("r", 0),
    ("r", "8"),
    ("r", True),
    ("lora_alpha", "much"),
    ("target_modules", [1]),
    ("target_modules", 3),
    ("target_modules", "(query"),
    ("rank_pattern", {"query": 0}),
    ("rank_pattern", ["query"]),
    ("alpha_pattern", {"(": 3}),
    ("bias", "some"),
    ("layers_to_transform", "0"),
    ("modules_to_save", "classifier"),
  ],
)
def test_a_field_that_cannot_be_honoured_is_named(bert, folder, field, value):
  file = folder / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
  named = "regular expression" if "(" in str(value) and "query" in str(value) else field
  if value == {"(": 3}:
    named = "regular expression"
  with pytest.raises(LoraxError, match=named):
    _read(bert, folder)


def test_a_field_of_the_future_that_is_off_is_passed_over(bert, folder):
  file = folder / "adapter_config.json"
  off = {"new_a": None, "new_b": False, "new_c": {}, "new_d": [], "new_e": ""}
  file.write_text(json.dumps(json.loads(file.read_text()) | off))
  _read(bert, folder)


def test_peft_type_alone_means_the_defaults(bert, tmp_path):
  model = _adapted(bert, target_modules=["query", "value"], r=8, task_type=None)
  folder = _save(model, tmp_path / "peft")
  raw = {"peft_type": "LORA", "target_modules": ["query", "value"]}
  (folder / "adapter_config.json").write_text(json.dumps(raw))
  _, config = _read(bert, folder)
  assert (config.rank, config.alpha, config.dropout) == (8, 8, 0.0)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"LORA"', "\x00\xff"])
def test_a_config_that_is_no_object_is_an_error(bert, folder, text):
  (folder / "adapter_config.json").write_text(text, encoding="latin-1")
  with pytest.raises(LoraxError, match=r"adapter_config\.json"):
    _read(bert, folder)


def _change(folder, change):
  file = folder / "adapter_model.safetensors"
  tensors = load_file(file)
  change(tensors)
  save_file(tensors, file)


QUERY_A = "encoder.layer.0.attention.self.query.lora_A.weight"


def _key(tensors, end=QUERY_A):
  (key,) = (key for key in tensors if key.endswith(end))
  return key


def test_a_missing_tensor_is_an_error_with_the_nearest_names(bert, folder):
  def change(tensors):
    key = _key(tensors)
    tensors[key.replace("query", "qury")] = tensors.pop(key)

  _change(folder, change)
  with pytest.raises(LoraxError, match=r"missing.*query\.lora_A.*nearest.*qury"):
    _read(bert, folder)


def test_a_tensor_too_many_is_an_error_with_the_nearest_names(bert, folder):
  def change(tensors):
    tensors[_key(tensors).replace("query", "key")] = tensors[_key(tensors)]

  _change(folder, change)
  with pytest.raises(LoraxError, match=r"self\.key\.lora_A.*nearest.*lora_A"):
    _read(bert, folder)


def test_a_mis_shaped_tensor_names_both_shapes(bert, folder):
  def change(tensors):
    tensors[_key(tensors)] = tensors[_key(tensors)][:, :-1].copy()

  _change(folder, change)
  with pytest.raises(LoraxError, match=r"query\.lora_A.*\(4, 15\), and \(4, 16\)"):
    _read(bert, folder)


def test_integers_are_no_factors(bert, folder):
  def change(tensors):
    tensors[_key(tensors)] = tensors[_key(tensors)].astype(np.int32)

  _change(folder, change)
  with pytest.raises(LoraxError, match="int32, not floating-point"):
    _read(bert, folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -3])
def test_a_truncated_file_is_an_error(bert, folder, keep):
  file = folder / "adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(LoraxError, match="cannot read"):
    _read(bert, folder)


def test_a_folder_without_weights_or_config_says_so(bert, folder, tmp_path):
  (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
  with pytest.raises(LoraxError, match="pickle"):
    _read(bert, folder)
  (folder / "adapter_config.json").unlink()
  with pytest.raises(LoraxError, match=r"no adapter_config\.json.*holds: .*README"):
    _read(bert, folder)
  with pytest.raises(LoraxError, match="no folder"):
    _read(bert, tmp_path / "nowhere")


def test_a_target_that_the_model_lacks_names_the_nearest(bert, folder):
  file = folder / "adapter_config.json"
  raw = json.loads(file.read_text()) | {"target_modules": ["qeury"]}
  file.write_text(json.dumps(raw))
  with pytest.raises(LoraxError, match="did you mean 'query'"):
    _read(bert, folder)


@pytest.mark.parametrize("targets", [["LayerNorm"], ["attention"]])
def test_a_target_that_is_no_linear_layer_is_an_error(bert, folder, targets):
  file = folder / "adapter_config.json"
  raw = json.loads(file.read_text()) | {"target_modules": targets}
  file.write_text(json.dumps(raw))
  with pytest.raises(LoraxError, match="no linear layer and no embedding"):
    _read(bert, folder)


def test_a_head_of_another_width_is_an_error(bert, folder):
  wider = copy.deepcopy(bert.config)
  wider.num_labels = 5
  with pytest.raises(LoraxError, match=r"classifier.*\(3, 16\), and \(5, 16\)"):
    _read(type(bert)(wider), folder)


def _write(bert, tmp_path, adapter=None, drop=(), task_type="SEQ_CLS", **kwargs):
  keymap = _keymap(bert)
  tuned = {"tuned": ("classifier",)}
  config = lx.LoraConfig(targets=r".*/query/kernel", **(tuned | kwargs))
  adapter = _toy(keymap, _params(bert, keymap), config) | (adapter or {})
  adapter = {p: d for p, d in adapter.items() if p not in drop}
  hub_peft.write_adapter(tmp_path / "out", adapter, keymap, config, task_type=task_type)


def test_a_classifier_that_is_not_trained_cannot_be_a_classifiers_folder(
  bert, tmp_path
):
  with pytest.raises(LoraxError, match="brings its head"):
    _write(bert, tmp_path, tuned=())
  _write(bert, tmp_path, tuned=(), task_type=None)


def test_half_a_module_cannot_be_saved(bert, tmp_path):
  leaf = jnp.ones(16)
  half = {"encoder/layer_0/layer_norm/scale": lx.Tuned(leaf, leaf)}
  with pytest.raises(LoraxError, match=r"without .*output\.LayerNorm\.bias"):
    _write(bert, tmp_path, half)


def test_a_single_bias_cannot_be_saved(bert, tmp_path):
  leaf = jnp.ones(16)
  one = {"encoder/layer_0/layer_norm/bias": lx.Tuned(leaf, leaf)}
  for bias, says in {
    "none": "without",
    "lora_only": "does not save",
    "all": "does not train",
  }.items():
    with pytest.raises(LoraxError, match=says):
      _write(bert, tmp_path, one, bias=bias)


def test_an_adapter_of_tuned_leaves_alone_has_no_peft_form(bert, tmp_path):
  drop = [f"encoder/layer_{i}/attention/query/kernel" for i in range(LAYERS)]
  with pytest.raises(LoraxError, match="one low-rank delta at least"):
    _write(bert, tmp_path, drop=drop)


def test_a_failed_write_leaves_nothing(bert, tmp_path):
  with pytest.raises(LoraxError):
    _write(bert, tmp_path, tuned=())
  assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_not_replaced(bert, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/thesis.tex").write_text("years")
  with pytest.raises(LoraxError, match=r"not empty: it holds thesis\.tex"):
    _write(bert, tmp_path)
  assert (tmp_path / "out/thesis.tex").exists()
