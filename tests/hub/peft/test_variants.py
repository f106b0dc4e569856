"""What PEFT writes of how an adapter was trained, older forms, and plain mistakes."""

import json

import jax
import numpy as np
import pytest
import torch
from peft.tuners.lora import config as lora_config
from safetensors.torch import load_file, save_file

import lorax_flax as lx
from experiments.predict import predict
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.peft import config_file
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry
from tests.hub.peft import peers
from tests.hub.peft.test_families import BASES
from tests.models import family

INPUTS = BASES["llama"][1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  return folder, BASES["llama"][0](folder)


@pytest.fixture(scope="module", params=[False, True], ids=["looped", "scanned"])
def loaded(base, request):
  return registry.load(base[0], scan=request.param)


def _folder(base, tmp_path, **config):
  model = peers.adapted(base[1], target_modules=["q_proj"], **config)
  return model, peers.save(model, tmp_path / "theirs")


@pytest.mark.parametrize(
  "config",
  [
    {"velora_config": lora_config.VeloraConfig(num_groups=2)},
    {"monteclora_config": lora_config.MontecloraConfig()},
    {"use_qalora": True, "qalora_group_size": 2},
  ],
  ids=lambda config: next(iter(config)),
)
def test_variants_of_training_compute_what_lora_does(config, base, loaded, tmp_path):
  model, theirs = _folder(base, tmp_path, **config)
  adapter, _ = hub_peft.read_adapter(theirs, loaded.params, loaded.keymap)
  merged = lx.merge(loaded.params, adapter)
  got = np.asarray(loaded.module.apply({"params": merged}, **INPUTS))
  with torch.no_grad():
    want = model(**family.tensors(INPUTS)).logits.numpy()
  real = INPUTS["attention_mask"] == 1
  np.testing.assert_allclose(got[real], want[real], atol=1e-4, rtol=1e-4)
  # To train a new one so is something else.
  with pytest.raises(lx.LoraxError, match="cannot honour it"):
    hub_peft.from_peft(theirs, loaded.keymap)


@pytest.mark.parametrize(
  ("init", "message"),
  [("eva", "use lorax_flax.init_from_activations"), ("mica", "is how PEFT starts")],
)
def test_a_start_of_pefts_is_kept_and_not_replaced_by_another(
  init, message, base, loaded, tmp_path
):
  _, theirs = _folder(base, tmp_path)
  file = theirs / "adapter_config.json"
  file.write_text(
    json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init})
  )
  adapter, config = hub_peft.read_adapter(theirs, loaded.params, loaded.keymap)
  hub_peft.write_adapter(
    tmp_path / "ours", adapter, loaded.keymap, config, task_type=None
  )
  assert config_file.read(tmp_path / "ours").init_lora_weights == init
  lora = lx.adapt(
    lambda params, inputs: loaded.module.apply({"params": params}, **inputs),
    hub_peft.from_peft(theirs, loaded.keymap),
  )
  with pytest.raises(lx.LoraxError, match=message):
    lora.init(jax.random.key(0), loaded.params, INPUTS)


def test_magnitudes_under_their_modules_name_are_read(base, loaded, tmp_path):
  _, theirs = _folder(base, tmp_path, use_dora=True)
  one, _ = hub_peft.read_adapter(theirs, loaded.params, loaded.keymap)
  file = theirs / peers.WEIGHTS
  tensors = load_file(file)
  assert any(key.endswith("lora_magnitude_vector") for key in tensors)
  renamed = {
    f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: value
    for key, value in tensors.items()
  }
  save_file(renamed, file)
  other, _ = hub_peft.read_adapter(theirs, loaded.params, loaded.keymap)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_layer_saved_in_full_needs_layers_apart(base, tmp_path):
  _, theirs = _folder(base, tmp_path, modules_to_save=["layers.1"])
  scanned = registry.load(base[0], scan=True)
  with pytest.raises(lx.LoraxError, match=r"scan=False \(--config.model.scan=false"):
    hub_peft.read_adapter(theirs, scanned.params, scanned.keymap)
  looped = registry.load(base[0])
  assert hub_peft.read_adapter(theirs, looped.params, looped.keymap)


def test_a_file_in_a_folders_place_is_told_the_folder(base, loaded, tmp_path):
  _, theirs = _folder(base, tmp_path)
  for name in (peers.WEIGHTS, peers.CONFIG):
    with pytest.raises(lx.LoraxError, match=rf"give {theirs}$"):
      hub_peft.read_adapter(theirs / name, loaded.params, loaded.keymap)
    with pytest.raises(lx.LoraxError, match=rf"give the folder, {theirs}$"):
      adapters.form(theirs / name)


def test_predict_applies_biases_that_the_base_has_no_place_for(base, tmp_path):
  model, theirs = _folder(base, tmp_path, lora_bias=True)
  ids = [5, 9, 3, 7]
  (tmp_path / "in.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
  predict(
    str(base[0]), str(theirs), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
  )
  got = json.loads((tmp_path / "out.jsonl").read_text())["logits"]
  with torch.no_grad():
    want = model(torch.tensor([ids])).logits[0, -1].numpy()
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
  loaded = registry.load(base[0])
  adapter, _ = hub_peft.read_adapter(theirs, loaded.params, loaded.keymap)
  with pytest.raises(lx.LoraxError, match=r"cannot be merged.*can be applied"):
    lx.merge(loaded.params, adapter)


@pytest.mark.parametrize(
  ("given", "auto", "task"),
  [
    (None, "BertModel", "FEATURE_EXTRACTION"),
    (None, "LlamaForCausalLM", "CAUSAL_LM"),
    (None, "MyBert", None),
    ("SEQ_CLS", "BertModel", "SEQ_CLS"),
  ],
)
def test_the_wrapped_class_tells_the_task_where_none_is_given(given, auto, task):
  raw = {"peft_type": "LORA", "task_type": given}
  raw["auto_mapping"] = {"base_model_class": auto, "parent_library": "x"}
  assert config_file.parse(raw).task == task


def test_mixtrals_default_is_pefts_and_its_old_experts_are_explained():
  raw = {"peft_type": "LORA"}
  default = config_file.parse(raw).with_defaults("mixtral")
  assert default.target_modules == ("q_proj", "v_proj")
  old = config_file.parse({**raw, "target_modules": ["q_proj", "w1", "w3"]})
  with pytest.raises(lx.LoraxError, match=r"w1, w3 of each expert.*PEFT that converts"):
    old.with_defaults("mixtral")
