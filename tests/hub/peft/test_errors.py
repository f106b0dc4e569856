"""PEFT folders that cannot be read or written: each ends in one message."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from lorax_flax.errors import LoraxError
from lorax_flax.hub.peft import folder as hub_peft
from tests.hub.peft import peers
from tests.hub.peft.peers import LAYERS

QUERY_VALUE = {"target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def bert():
  return peers.tiny_classifier("bert")


@pytest.fixture
def folder(bert, tmp_path):
  return peers.save(
    peers.adapted(bert, task_type="SEQ_CLS", **QUERY_VALUE), tmp_path / "peft"
  )


def _read(bert, folder):
  keymap = peers.bert_keymap(bert)
  return hub_peft.read_adapter(folder, peers.params(bert, keymap), keymap)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("layer_replication", [[0, 1]]),
    ("trainable_token_indices", []),
    ("trainable_token_indices", [1, 1]),
    ("trainable_token_indices", {"word_embeddings": [-1]}),
    ("megatron_config", {"a": 1}),
    ("init_lora_weights", "pissa_niter_4"),
    ("peft_type", "XLORA"),
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
  named = "regular expression" if value in ("(query", {"(": 3}) else field
  with pytest.raises(LoraxError, match=named):
    _read(bert, folder)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"use_dora": True}, r"missing tensors.*query\.lora_magnitude_vector"),
    ({"lora_bias": True}, r"missing tensors.*query\.lora_B\.bias"),
    ({"use_dora": True, "lora_bias": True}, "do not go together"),
    ({"trainable_token_indices": [1]}, r"missing tensors.*trainable_tokens_delta"),
    ({"trainable_token_indices": [40]}, "go up to 40, and .*word_embeddings has 40"),
    ({"trainable_token_indices": {"words": [1]}}, "unknown module 'words'"),
    ({"target_parameters": ["query.wight"]}, "target parameter 'query.wight'"),
    ({"target_parameters": ["query.weight"]}, "target_modules and target_parameters"),
    ({"modules_to_save": ["embeddings", "bert"]}, "inside of it, and PEFT cannot load"),
    ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    ({"target_modules": ["word_embeddings"], "lora_bias": True}, "no lora_bias for em"),
    (
      {"target_modules": ["word_embeddings"], "trainable_token_indices": [3]},
      "by target_modules and trainable_token_indices both",
    ),
  ],
)
def test_fields_that_do_not_fit_say_why(bert, folder, fields, message):
  file = folder / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  with pytest.raises(LoraxError, match=message):
    _read(bert, folder)


def test_no_target_modules_mean_pefts_default_for_the_family(bert, folder):
  file = folder / "adapter_config.json"
  raw = json.loads(file.read_text()) | {"target_modules": None}
  file.write_text(json.dumps(raw))
  _, config = _read(bert, folder)
  names = {path.split("/")[-2] for path in config.targets}
  assert names == {"query", "value"}


def test_a_field_of_the_future_that_is_off_is_passed_over(bert, folder):
  file = folder / "adapter_config.json"
  off = {"new_a": None, "new_b": False, "new_c": {}, "new_d": [], "new_e": ""}
  file.write_text(json.dumps(json.loads(file.read_text()) | off))
  _read(bert, folder)


def test_peft_type_alone_means_the_defaults(bert, tmp_path):
  model = peers.adapted(bert, target_modules=["query", "value"], r=8)
  folder = peers.save(model, tmp_path / "peft")
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
  (folder / "adapter_model.safetensors").unlink()
  with pytest.raises(LoraxError, match=r"no adapter_model\.safetensors and no .*\.bin"):
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
  with pytest.raises(LoraxError, match="which is no linear layer, no embedding"):
    _read(bert, folder)


def test_a_head_of_another_width_is_an_error(bert, folder):
  wider = copy.deepcopy(bert.config)
  wider.num_labels = 5
  with pytest.raises(LoraxError, match=r"classifier.*\(3, 16\), and \(5, 16\)"):
    _read(type(bert)(wider), folder)


def _write(bert, tmp_path, adapter=None, drop=(), task_type="SEQ_CLS", **kwargs):
  keymap = peers.bert_keymap(bert)
  tuned = {"tuned": ("classifier",)}
  config = lx.LoraConfig(targets=r".*/query/kernel", **(tuned | kwargs))
  adapter = peers.toy(keymap, peers.params(bert, keymap), config) | (adapter or {})
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
