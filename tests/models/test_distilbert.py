"""DistilBERT against transformers."""

import numpy as np
import pytest
import transformers

import lorax_flax as lx
from lorax_flax.models import registry
from tests.models import family, peers

SIZES = {
  "vocab_size": 37,
  "dim": 12,
  "n_layers": 3,
  "n_heads": 3,
  "hidden_dim": 20,
  "max_position_embeddings": 23,
  "initializer_range": 0.3,
}


def save(folder, **fields):
  config = transformers.DistilBertConfig(**{**SIZES, **fields})
  model = transformers.DistilBertForSequenceClassification(config)
  return family.save(folder, model)


def batch(length=11, rows=3):
  inputs = peers.batch(length=length, rows=rows)
  return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("scan", [False, True])
def test_logits_equal_transformers(tmp_path, scan):
  model = save(tmp_path, num_labels=3)
  batches = [batch(1, rows=1), batch(11), batch(23)]
  loaded = family.check_logits(tmp_path, model, batches, scan=scan)
  family.check_full_keys(loaded, model)
  assert not family.check_modules(loaded, model)


@pytest.mark.parametrize("fields", [{"activation": "relu"}, {"num_labels": 1}])
def test_variants_equal_transformers(tmp_path, fields):
  family.check_logits(tmp_path, save(tmp_path, **fields), [batch()])


@pytest.mark.parametrize("remat", ["full", "inputs"])
def test_gradients_equal_torch_with_scan_and_remat(tmp_path, remat):
  model = save(tmp_path)
  family.check_gradients(tmp_path, model, batch(), scan=True, remat=remat)


@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_comes_back_as_it_was_read(tmp_path, scan):
  model = save(tmp_path / "base", num_labels=3)
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=scan)


def test_lora_on_every_linear_layer_less_the_head(tmp_path):
  save(tmp_path)
  loaded = registry.load(tmp_path)
  layer = [f"attention/{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
  layer += ["ffn/lin1", "ffn/lin2"]
  want = [f"transformer/layer_{i}/{name}/kernel" for i in range(3) for name in layer]
  family.check_lora(loaded, batch(), [*want, "pre_classifier/kernel"])


def test_a_pretraining_checkpoint_gets_a_new_head(tmp_path):
  config = transformers.DistilBertConfig(**SIZES)
  family.save(tmp_path, transformers.DistilBertForMaskedLM(config))
  loaded = registry.load(tmp_path, num_labels=4)
  assert {path.split("/")[0] for path in loaded.new_paths} == {
    "pre_classifier",
    "classifier",
  }
  assert "vocab_transform.weight" in loaded.ignored_keys


def test_names_that_transformers_takes_for_a_field_are_read(tmp_path):
  model = save(tmp_path)
  family.change_config(tmp_path, n_layers=..., num_hidden_layers=3)
  family.check_logits(tmp_path, model, [batch()])
  family.change_config(tmp_path, n_layers=2)
  with pytest.raises(lx.LoraxError, match="num_hidden_layers=3 and n_layers=2"):
    registry.load(tmp_path)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"activation": "geluu"}, "did you mean 'gelu'"),
    ({"dim": 13}, "dim 13 is not a multiple of n_heads 3"),
    ({"n_layers": 10**9}, "n_layers must be from 1 to 1000"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
  ],
)
def test_a_config_that_we_cannot_honour_is_an_error(tmp_path, fields, message):
  save(tmp_path)
  family.change_config(tmp_path, **fields)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


def test_a_text_longer_than_the_positions_is_an_error(tmp_path):
  save(tmp_path)
  with pytest.raises(lx.LoraxError, match="24 tokens: the model takes at most 23"):
    family.logits(registry.load(tmp_path), batch(24))


def test_bfloat16_is_close(tmp_path):
  model = save(tmp_path, initializer_range=0.05)
  got = family.logits(registry.load(tmp_path, dtype="bfloat16"), batch())
  np.testing.assert_allclose(got, family.torch_logits(model, batch()), atol=0.05)
