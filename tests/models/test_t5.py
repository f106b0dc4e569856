"""T5 v1.0 and v1.1 against transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import lorax_flax as lx
from lorax_flax.models import ops, registry
from lorax_flax.models.t5 import positions
from tests.models import family

SIZES = {
  "vocab_size": 37,
  "d_model": 12,
  "d_kv": 5,
  "d_ff": 20,
  "num_layers": 2,
  "num_decoder_layers": 3,
  "num_heads": 3,
  "relative_attention_num_buckets": 9,
  "relative_attention_max_distance": 14,
  "decoder_start_token_id": 0,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VERSIONS = pytest.mark.parametrize("version", [{}, V1_1], ids=["v1.0", "v1.1"])


def save(folder, **fields):
  config = transformers.T5Config(**{**SIZES, **fields})
  model = transformers.T5ForConditionalGeneration(config)
  torch.manual_seed(1)
  if not config.scale_decoder_outputs:
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, 12))
  for stack in (model.encoder, model.decoder):
    # As wide as logits are, so that a wrong distance would show.
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    torch.nn.init.normal_(table.weight, std=2.0)
  return family.save(folder, model)


def batch(length=19, decoder_length=17, rows=4):
  inputs = {}
  for prefix, size in (("", length), ("decoder_", decoder_length)):
    ids, mask = family.tokens(size, rows, SIZES["vocab_size"])
    inputs |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
  return inputs


def real(inputs):
  """Tokens: what a padding attends to is nobody's business."""
  return inputs["decoder_attention_mask"] == 1


@pytest.mark.parametrize("scan", [False, True])
@VERSIONS
def test_logits_equal_transformers(tmp_path, version, scan):
  model = save(tmp_path, **version)
  batches = [batch(1, 1, rows=1), batch()]
  loaded = family.check_logits(tmp_path, model, batches, real=real, scan=scan)
  tied = ["lm_head.weight"] * (not version)
  assert sorted(loaded.keymap.ties) == sorted(
    ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *tied]
  )
  family.check_full_keys(loaded, model)
  assert not family.check_modules(loaded, model)


def test_a_decoder_without_a_mask_sees_all_tokens_before(tmp_path):
  model = save(tmp_path)
  inputs = batch()
  del inputs["decoder_attention_mask"]
  family.check_logits(tmp_path, model, [inputs])


@pytest.mark.parametrize("projection", ["gelu", "gated-silu"])
def test_variants_equal_transformers(tmp_path, projection):
  model = save(tmp_path, feed_forward_proj=projection, num_decoder_layers=None)
  family.check_logits(tmp_path, model, [batch()], real=real)


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (9, 14), (4, 3), (64, 500)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_transformers(count, farthest, both_ways):
  ahead = np.arange(-3000, 3001)
  want = T5Attention._relative_position_bucket(
    torch.tensor(ahead), both_ways, count, farthest
  )
  got = positions.buckets(
    ahead, bidirectional=both_ways, count=count, max_distance=farthest
  )
  np.testing.assert_array_equal(got, want)
  assert set(got) <= set(range(count))


def test_gradients_equal_torch_with_scan_and_remat(tmp_path):
  model = save(tmp_path)
  family.check_gradients(tmp_path, model, batch(), real=real, scan=True, remat="full")


@pytest.mark.parametrize("scan", [False, True])
@VERSIONS
def test_a_checkpoint_comes_back_as_it_was_read(tmp_path, version, scan):
  model = save(tmp_path / "base", **version)
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=scan)
  was, now = (
    load_file(tmp_path / name / "model.safetensors") for name in ("base", "out")
  )
  assert was.keys() == now.keys()


def test_an_old_checkpoint_with_repeats_and_an_unused_table_is_read(tmp_path):
  model = save(tmp_path)
  path = tmp_path / "model.safetensors"
  stored = load_file(path)
  unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
  repeats = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
  stored |= dict.fromkeys(repeats, stored["shared.weight"])
  save_file(stored | {unused: np.zeros((9, 3), np.float32)}, path)
  loaded = family.check_logits(tmp_path, model, [batch()], real=real)
  assert sorted(loaded.ignored_keys) == sorted([*repeats, unused])
  # One of the names is enough.
  save_file({k: v for k, v in stored.items() if k != "shared.weight"}, path)
  family.check_logits(tmp_path, model, [batch()], real=real)


def test_which_head_is_meant_is_told_by_either_field(tmp_path):
  model = save(tmp_path, **V1_1)
  config = registry.read_config(tmp_path)
  assert (config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (1, 0)
  family.change_config(tmp_path, tie_word_embeddings=False, scale_decoder_outputs=...)
  family.check_logits(tmp_path, model, [batch()], real=real)
  family.change_config(tmp_path, tie_word_embeddings=True)
  with pytest.raises(lx.LoraxError, match=r"ties 'lm_head\.weight'"):
    registry.load(tmp_path)


def test_lora_on_every_linear_layer_less_the_head(tmp_path):
  save(tmp_path, **V1_1)
  loaded = registry.load(tmp_path, scan=True)
  attend = [f"attention/{name}" for name in "qkvo"]
  mlp = [f"mlp/{name}" for name in ("wi_0", "wi_1", "wo")]
  want = [f"encoder/layers/{name}/kernel" for name in attend + mlp]
  cross = [f"cross_{name}" for name in attend]
  want += [f"decoder/layers/{name}/kernel" for name in attend + cross + mlp]
  family.check_lora(loaded, batch(), want)


@VERSIONS
def test_every_axis_has_a_rule(tmp_path, version):
  save(tmp_path, **version)
  family.check_axes(registry.load(tmp_path))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"is_decoder": True}, "is_decoder=True is not supported"),
    ({"feed_forward_proj": "geluu", "dense_act_fn": ...}, "did you mean 'gelu'"),
    ({"dense_act_fn": "silu"}, "dense_act_fn='silu' is not supported, only 'relu'"),
    ({"num_decoder_layers": 0}, "num_decoder_layers must be from 1 to 1000"),
    ({"d_kv": 0}, "d_kv must be a positive integer"),
    ({"relative_attention_max_distance": 4}, "must be more than half of relative"),
    ({"relative_attention_num_buckets": 3}, "must be an integer from 4 on"),
    ({"hidden_size": 13}, "hidden_size=13 and d_model=12"),
  ],
)
def test_a_config_that_we_cannot_honour_is_an_error(tmp_path, fields, message):
  save(tmp_path)
  family.change_config(tmp_path, **fields)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


def test_attention_drops_weights_and_keeps_their_mean():
  zeros, ones = np.zeros((2, 64, 1, 4), np.float32), np.ones((2, 64, 1, 4), np.float32)
  bias, seen = np.zeros((1, 64, 64), np.float32), np.ones((1, 1, 1), bool)

  def attend(rng):
    how = {"scale": 1.0, "dropout_rate": 0.25, "dropout_rng": rng}
    return ops.biased_attention(zeros, zeros, ones, bias, seen, **how)

  np.testing.assert_allclose(attend(None), 1.0, rtol=1e-6)
  dropped = attend(jax.random.key(0))
  assert dropped.std() > 0.01
  np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.05)


def test_bfloat16_is_close(tmp_path):
  model = save(tmp_path, initializer_factor=0.5)
  got = family.logits(registry.load(tmp_path, dtype="bfloat16"), batch())
  want = family.torch_logits(model, batch())
  picked = real(batch())
  np.testing.assert_allclose(got[picked], want[picked], atol=0.05)
