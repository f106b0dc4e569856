"""ViT against transformers."""

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from lorax_flax.models import registry
from tests.models import family

SIZES = {
  "hidden_size": 12,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "intermediate_size": 20,
  "image_size": (9, 14),  # with pixels left over on both sides
  "patch_size": (4, 3),
  "num_channels": 2,
  "initializer_range": 0.3,
}
LINEAR = [f"attention/{name}_proj" for name in "qkvo"] + ["mlp/fc1", "mlp/fc2"]


def save(folder, kind=transformers.ViTForImageClassification, **fields):
  return family.save(folder, kind(transformers.ViTConfig(**{**SIZES, **fields})))


def batch(rows=3, shape=(2, 9, 14)):
  rng = np.random.default_rng(rows)
  return {"pixel_values": rng.normal(size=(rows, *shape)).astype(np.float32)}


@pytest.mark.parametrize("scan", [False, True])
def test_logits_equal_transformers(tmp_path, scan):
  model = save(tmp_path, num_labels=5)
  loaded = family.check_logits(tmp_path, model, [batch(1), batch(3)], scan=scan)
  family.check_full_keys(loaded, model)
  assert not family.check_modules(loaded, model)


@pytest.mark.parametrize(
  ("fields", "shape"),
  [
    ({"qkv_bias": False, "num_labels": 1}, (2, 9, 14)),
    ({"image_size": 8, "patch_size": 4, "hidden_act": "gelu_new"}, (2, 8, 8)),
  ],
)
def test_variants_equal_transformers(tmp_path, fields, shape):
  model = save(tmp_path, **fields)
  loaded = family.check_logits(tmp_path, model, [batch(2, shape)])
  family.check_full_keys(loaded, model)


def test_gradients_equal_torch_with_scan_and_remat(tmp_path):
  model = save(tmp_path)
  family.check_gradients(tmp_path, model, batch(), scan=True, remat="full")


@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_comes_back_as_it_was_read(tmp_path, scan):
  model = save(tmp_path / "base", num_labels=3)
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=scan)
  was, now = (
    load_file(tmp_path / name / "model.safetensors") for name in ("base", "out")
  )
  assert was.keys() == now.keys()


def test_files_with_the_old_and_with_the_new_names_are_read(tmp_path):
  model = save(tmp_path)
  path = tmp_path / "model.safetensors"
  old = "vit.encoder.layer.0.attention.attention.query.weight"
  assert old in load_file(path)
  save_file({k: v.numpy() for k, v in model.state_dict().items()}, path)
  assert old not in load_file(path)
  family.check_logits(tmp_path, model, [batch()])


def test_lora_on_every_linear_layer_and_the_patches_less_the_head(tmp_path):
  save(tmp_path)
  loaded = registry.load(tmp_path, scan=True)
  want = [f"layers/{name}/kernel" for name in LINEAR]
  family.check_lora(loaded, batch(), [*want, "embeddings/projection/kernel"])


@pytest.mark.parametrize(
  ("kind", "other"),
  [
    (transformers.ViTModel, "pooler.dense.weight"),
    (transformers.ViTForMaskedImageModeling, "decoder.0.weight"),
  ],
)
def test_a_pretraining_checkpoint_gets_a_new_head(tmp_path, kind, other):
  save(tmp_path, kind)
  loaded = registry.load(tmp_path, num_labels=4)
  assert set(loaded.new_paths) == {"classifier/kernel", "classifier/bias"}
  assert other in loaded.ignored_keys
  assert family.logits(loaded, batch()).shape == (3, 4)


def test_every_axis_has_a_rule(tmp_path):
  save(tmp_path)
  family.check_axes(registry.load(tmp_path))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"hidden_act": "geluu"}, "did you mean 'gelu'"),
    ({"hidden_size": 13}, "hidden_size 13 is not a multiple of num_attention_heads"),
    ({"image_size": [9, 14, 3]}, "image_size must be a number of pixels, or two"),
    ({"patch_size": True}, "patch_size must be a number of pixels, or two"),
    ({"patch_size": 10}, r"patch_size \(10, 10\) is larger than image_size"),
    ({"head_dim": 8}, "head_dim=8 is not supported"),
    ({"qkv_bias": "no"}, "qkv_bias must be true or false"),
  ],
)
def test_a_config_that_we_cannot_honour_is_an_error(tmp_path, fields, message):
  save(tmp_path)
  family.change_config(tmp_path, **fields)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


def test_an_image_of_another_size_is_an_error(tmp_path):
  save(tmp_path)
  with pytest.raises(lx.LoraxError, match=r"\(2, 9, 15\): the model takes \(2, 9, 14"):
    family.logits(registry.load(tmp_path), batch(1, (2, 9, 15)))


def test_bfloat16_is_close(tmp_path):
  model = save(tmp_path, initializer_range=0.05)
  got = family.logits(registry.load(tmp_path, dtype="bfloat16"), batch())
  np.testing.assert_allclose(got, family.torch_logits(model, batch()), atol=0.05)
