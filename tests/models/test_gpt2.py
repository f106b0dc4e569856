"""GPT-2 against transformers."""

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from lorax_flax.models import registry
from tests.models import family

SIZES = {
  "vocab_size": 37,
  "n_embd": 12,
  "n_layer": 3,
  "n_head": 3,
  "n_positions": 23,
  "initializer_range": 0.3,
  "bos_token_id": 1,
  "eos_token_id": 1,
}


def save(folder, kind=transformers.GPT2LMHeadModel, **fields):
  return family.save(folder, kind(transformers.GPT2Config(**{**SIZES, **fields})))


def batch(length=11, rows=4):
  ids, mask = family.tokens(length, rows, SIZES["vocab_size"])
  return {"input_ids": ids, "attention_mask": mask}


def real(inputs):
  """Tokens: what a padding attends to is nobody's business."""
  return inputs["attention_mask"] == 1


@pytest.mark.parametrize("scan", [False, True])
def test_logits_equal_transformers(tmp_path, scan):
  model = save(tmp_path)
  batches = [batch(1, rows=1), batch(11), batch(23)]
  loaded = family.check_logits(tmp_path, model, batches, real=real, scan=scan)
  family.check_full_keys(loaded, model)
  assert not family.check_modules(loaded, model)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  "fields",
  [
    {"scale_attn_by_inverse_layer_idx": True, "n_inner": 7},
    {
      "scale_attn_weights": False,
      "tie_word_embeddings": False,
      "activation_function": "relu",
      "reorder_and_upcast_attn": True,
    },
  ],
)
def test_variants_equal_transformers(tmp_path, fields, scan):
  model = save(tmp_path, **fields)
  loaded = family.check_logits(tmp_path, model, [batch()], real=real, scan=scan)
  family.check_full_keys(loaded, model)
  assert not family.check_modules(loaded, model)


def test_gradients_equal_torch_with_scan_and_remat(tmp_path):
  model = save(tmp_path)
  family.check_gradients(tmp_path, model, batch(), real=real, scan=True, remat="full")


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_as_it_was_read(tmp_path, tied):
  model = save(tmp_path / "base", tie_word_embeddings=tied)
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=tied)
  was, now = (
    load_file(tmp_path / name / "model.safetensors") for name in ("base", "out")
  )
  assert was.keys() == now.keys()


def test_an_old_checkpoint_without_prefix_and_with_masks_is_read(tmp_path):
  model = save(tmp_path)
  path = tmp_path / "model.safetensors"
  stored = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
  for i in range(SIZES["n_layer"]):
    stored[f"h.{i}.attn.bias"] = np.tri(23, dtype=np.float32)[None, None]
    stored[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
  save_file(stored, path)
  loaded = family.check_logits(tmp_path, model, [batch()], real=real)
  assert len(loaded.ignored_keys) == 2 * SIZES["n_layer"]


def test_a_tied_head_that_says_otherwise_is_an_error(tmp_path):
  save(tmp_path)
  path = tmp_path / "model.safetensors"
  stored = load_file(path)
  stored["lm_head.weight"] = stored["transformer.wte.weight"]
  save_file(stored, path)
  assert "lm_head.weight" in registry.load(tmp_path).ignored_keys
  save_file(stored | {"lm_head.weight": stored["lm_head.weight"] + 1}, path)
  with pytest.raises(lx.LoraxError, match=r"ties 'lm_head\.weight'"):
    registry.load(tmp_path)


def test_lora_on_every_linear_layer_less_the_head(tmp_path):
  save(tmp_path, n_layer=2)
  loaded = registry.load(tmp_path)
  names = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
  want = [f"layer_{i}/{name}/kernel" for i in range(2) for name in names]
  family.check_lora(loaded, batch(), want)


def test_a_classifiers_checkpoint_is_refused_by_name(tmp_path):
  save(tmp_path, transformers.GPT2ForSequenceClassification)
  with pytest.raises(lx.LoraxError, match="GPT2ForSequenceClassification is not built"):
    registry.load(tmp_path)
  family.change_config(tmp_path, architectures=None)
  with pytest.raises(lx.LoraxError, match=r"unknown gpt2 checkpoint key 'score\.wei"):
    registry.load(tmp_path)
  save(tmp_path)
  with pytest.raises(lx.LoraxError, match="gpt2 is a causal-lm model"):
    registry.load(tmp_path, num_labels=3)


@pytest.mark.parametrize("tied", [True, False])
def test_every_axis_has_a_rule(tmp_path, tied):
  save(tmp_path, tie_word_embeddings=tied)
  family.check_axes(registry.load(tmp_path))


def test_names_that_transformers_takes_for_a_field_are_read(tmp_path):
  model = save(tmp_path)
  family.change_config(tmp_path, n_embd=..., hidden_size=12)
  family.check_logits(tmp_path, model, [batch()], real=real)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"activation_function": "geluu"}, "did you mean 'gelu'"),
    ({"n_embd": 13}, "n_embd 13 is not a multiple of n_head 3"),
    ({"n_layer": 10**9}, "n_layer must be from 1 to 1000"),
    ({"n_inner": 0}, "n_inner must be a positive integer"),
    ({"attn_pdrop": 1.0}, r"attn_pdrop must be in \[0, 1\)"),
    ({"scale_attn_weights": 1}, "scale_attn_weights must be true or false"),
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
  want = family.torch_logits(model, batch())
  picked = real(batch())
  np.testing.assert_allclose(got[picked], want[picked], atol=0.05)
