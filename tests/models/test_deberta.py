"""DeBERTa-v2 and v3 against transformers."""

import dataclasses
import functools
import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from transformers.models.deberta_v2 import modeling_deberta_v2 as peer

import lorax_flax as lx
from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry
from lorax_flax.models.deberta import attention
from lorax_flax.models.deberta import model as deberta
from tests.models import family, peers

SIZES = {**peers.SIZES, "num_hidden_layers": 2}
# Three buckets a side hold one distance each, and four are logarithmic.
V3 = {
  **SIZES,
  "relative_attention": True,
  "pos_att_type": ["p2c", "c2p"],
  "position_buckets": 7,
  "max_relative_positions": -1,
  "max_position_embeddings": 23,
  "share_att_key": True,
  "norm_rel_ebd": "layer_norm",
  "position_biased_input": False,
}
V2 = {**V3, "conv_kernel_size": 3, "conv_act": "gelu"}
SPLIT = {
  **V3,
  "pos_att_type": "c2p|p2c",
  "share_att_key": False,
  "norm_rel_ebd": "none",
  "position_buckets": -1,
  "max_relative_positions": 5,
  "position_biased_input": True,
  "type_vocab_size": 2,
  "embedding_size": 8,
}
PLAIN = {**SIZES, "max_position_embeddings": 23}

# As they are published, less names of tokens and files.
PUBLISHED = {
  "attention_head_size": 64,
  "attention_probs_dropout_prob": 0.1,
  "hidden_act": "gelu",
  "hidden_dropout_prob": 0.1,
  "initializer_range": 0.02,
  "layer_norm_eps": 1e-7,
  "max_position_embeddings": 512,
  "max_relative_positions": -1,
  "model_type": "deberta-v2",
  "norm_rel_ebd": "layer_norm",
  "pad_token_id": 0,
  "pooler_dropout": 0,
  "pooler_hidden_act": "gelu",
  "pos_att_type": "p2c|c2p",
  "position_biased_input": False,
  "position_buckets": 256,
  "relative_attention": True,
  "share_att_key": True,
  "type_vocab_size": 0,
  "vocab_size": 128100,
}
XXLARGE = {
  **PUBLISHED,
  "conv_act": "gelu",
  "conv_kernel_size": 3,
  "hidden_size": 1536,
  "intermediate_size": 6144,
  "num_attention_heads": 24,
  "num_hidden_layers": 48,
  "pooler_hidden_size": 1536,
}
V3_BASE = {
  **PUBLISHED,
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "pooler_hidden_size": 768,
}


def save(folder, fields, **more):
  config = transformers.DebertaV2Config(**{**fields, **more})
  return family.save(folder, transformers.DebertaV2ForSequenceClassification(config))


def batch(length=11, rows=3):
  return peers.batch(length=length, rows=rows)


@pytest.mark.parametrize(
  ("fields", "scan"),
  [(V2, False), (V2, True), (SPLIT, False)],
  ids=["v2", "v2-scan", "split"],
)
def test_logits_equal_transformers(tmp_path, fields, scan):
  model = save(tmp_path, fields, num_labels=3)
  # A text of one token, one whose distances all have their own bucket, the longest.
  batches = [batch(1, rows=1), batch(4, rows=1), batch(23)]
  loaded = family.check_logits(tmp_path, model, batches, scan=scan)
  family.check_full_keys(loaded, model)
  family.check_axes(loaded)
  assert not family.check_modules(loaded, model)


@pytest.mark.parametrize(
  "fields",
  [
    V3,
    PLAIN,
    {**PLAIN, "pos_att_type": ["c2p"]},
    {**V3, "pos_att_type": None},
    {**V3, "pos_att_type": "p2c"},
    {**V3, "pos_att_type": ["c2p"], "norm_rel_ebd": "none"},
    {**SPLIT, "pos_att_type": ["p2c"], "embedding_size": 12, "num_labels": 1},
    {**SPLIT, "position_buckets": 4, "max_relative_positions": 40},
    {**V2, "conv_kernel_size": 5, "conv_groups": 3, "num_hidden_layers": 1},
    {**V2, "pooler_hidden_act": "tanh", "hidden_act": "relu"},
  ],
  ids=range(10),
)
def test_variants_equal_transformers(tmp_path, fields):
  model = save(tmp_path, fields)
  loaded = family.check_logits(tmp_path, model, [batch(13)], scan=True)
  family.check_full_keys(loaded, model)


def test_a_text_longer_than_max_position_embeddings_is_read_without_such_a_table(
  tmp_path,
):
  model = save(tmp_path, V3)
  family.check_logits(tmp_path, model, [batch(31)])


def test_padding_on_the_left_and_rows_of_nothing_else_equal_transformers(tmp_path):
  model = save(tmp_path, V2)
  inputs = batch(11)
  inputs["attention_mask"] = inputs["attention_mask"][:, ::-1].copy()
  inputs["attention_mask"][0] = 0
  family.check_logits(tmp_path, model, [inputs])


@pytest.mark.parametrize(
  ("fields", "remat"), [(V2, "full"), (SPLIT, "inputs")], ids=["v2", "split"]
)
def test_gradients_equal_torch_with_scan_and_remat(tmp_path, fields, remat):
  model = save(tmp_path, fields)
  family.check_gradients(tmp_path, model, batch(), scan=True, remat=remat)


def test_gradients_equal_torch_without_either(tmp_path):
  model = save(tmp_path, V2, share_att_key=False)
  family.check_gradients(tmp_path, model, batch(9))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("fields", [V2, SPLIT], ids=["v2", "split"])
def test_a_checkpoint_comes_back_as_it_was_read(tmp_path, fields, scan):
  model = save(tmp_path / "base", fields, num_labels=3)
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=scan)


def test_lora_on_every_linear_layer_less_the_head(tmp_path):
  save(tmp_path, SPLIT, num_hidden_layers=1)
  names = ("query", "key", "value", "pos_key", "pos_query")
  layer = [f"attention/{name}_proj" for name in names]
  layer += ["attention/output", "intermediate", "output"]
  want = [f"encoder/layer_0/{name}/kernel" for name in layer]
  want += ["embeddings/embed_proj/kernel", "pooler/kernel"]
  family.check_lora(registry.load(tmp_path), batch(), want)


def test_lora_on_projections_that_contents_and_positions_share(tmp_path):
  save(tmp_path, V3)
  family.check_lora(
    registry.load(tmp_path, scan=True),
    batch(),
    [f"encoder/layers/attention/{name}_proj/kernel" for name in ("query", "value")],
    targets=".*/(query|value)_proj/kernel",
  )


# Of transformers, about itself.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_peft_gives_pefts_logits(tmp_path):
  model = save(tmp_path / "base", V2)
  config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules="all-linear")
  adapted = peft.get_peft_model(model, config).eval()
  with torch.no_grad():
    for name, parameter in adapted.named_parameters():
      if "lora_B" in name:
        parameter.normal_(std=0.3)
  adapted.save_pretrained(tmp_path / "adapter")
  loaded = registry.load(tmp_path / "base", scan=True)
  read = functools.partial(hub_peft.read_adapter, tmp_path / "adapter")
  adapter, _ = read(loaded.params, loaded.keymap)
  assert "pooler/kernel" in adapter
  merged = lx.merge(loaded.params, adapter)
  got = family.logits(dataclasses.replace(loaded, params=merged), batch())
  want = family.torch_logits(adapted, batch())
  np.testing.assert_allclose(got, want, atol=family.TOLERANCE)
  assert not np.allclose(got, family.logits(loaded, batch()), atol=0.1)
  # PEFT writes the names that "all-linear" came to; the word means the same here.
  file = tmp_path / "adapter" / "adapter_config.json"
  raw = json.loads(file.read_text())
  file.write_text(json.dumps(raw | {"target_modules": "all-linear"}))
  assert read(loaded.params, loaded.keymap)[0].keys() == adapter.keys()


def test_a_pretraining_checkpoint_gets_a_new_head(tmp_path):
  config = transformers.DebertaV2Config(**V3, legacy=False)
  model = family.save(tmp_path, transformers.DebertaV2ForMaskedLM(config))
  loaded = registry.load(tmp_path, num_labels=4)
  assert {path.split("/")[0] for path in loaded.new_paths} == {"pooler", "classifier"}
  assert "lm_predictions.lm_head.bias" in loaded.ignored_keys
  got = jax.tree.leaves(loaded.params["embeddings"]["word_embeddings"])[0]
  want = model.deberta.embeddings.word_embeddings.weight.detach().numpy()
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("length", [1, 2, 130, 512, 700])
@pytest.mark.parametrize(
  ("buckets", "furthest"), [(256, 512), (32, 512), (7, 23), (4, 40), (-1, 9)]
)
def test_rows_of_the_table_are_transformers(length, buckets, furthest):
  config = deberta.from_hf(
    {
      **PUBLISHED,
      "position_buckets": buckets,
      "max_relative_positions": furthest,
      "attention_head_size": 64,
    }
  )
  x = torch.zeros(1, length, 1)
  want = peer.build_relative_position(x, x, buckets, furthest)[0] + config.span
  want = want.clamp(0, 2 * config.span - 1).numpy()
  rows = attention.rows(config, length)
  i = np.arange(length)
  np.testing.assert_array_equal(rows[i[:, None] - i + length], want)
  used = attention.used(config, length)
  assert (used[0], used[-1]) == (want.min(), want.max())


@pytest.mark.parametrize(
  ("hf_config", "scan", "millions"),
  [(XXLARGE, True, 1566), (V3_BASE, False, 184)],
  ids=["xxlarge", "v3-base"],
)
def test_the_published_models_have_transformers_shapes(hf_config, scan, millions):
  member = registry.of(hf_config)
  config = member.configure(hf_config)
  shapes = member.shapes(member.build(config, "float32", scan, "none"))
  with torch.device("meta"):
    model = transformers.DebertaV2ForSequenceClassification(
      transformers.DebertaV2Config(**hf_config)
    )
  found = {}
  keymap = member.keymap(config, scan)
  leaves = {"/".join(k.key for k in p): x for p, x in jax.tree.leaves_with_path(shapes)}
  assert leaves.keys() == keymap.keys.keys()
  for bare, site in keymap.sites.items():
    shape = site.entry.form.stored_shape(site.shape(leaves[site.path].shape))
    found[km.full_key(keymap, bare)] = shape
  assert found == {name: tuple(x.shape) for name, x in model.state_dict().items()}
  total = sum(leaf.size for leaf in leaves.values())
  assert total == sum(p.numel() for p in model.parameters())
  assert total // 10**6 == millions


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"pos_att_type": "c2p|p2p"}, "pos_att_type 'p2p'"),
    ({"pos_att_type": 3}, "pos_att_type must be names joined by |"),
    ({"norm_rel_ebd": "layernorm"}, "did you mean 'layer_norm'"),
    ({"relative_attention": False}, "norm_rel_ebd without relative_attention"),
    ({"attention_head_size": 5}, "attention_head_size must be 4 in this model"),
    ({"pooler_hidden_size": 13}, "pooler_hidden_size must be 12 in this model"),
    ({"conv_kernel_size": 4}, "conv_kernel_size must be odd, or 0, not 4"),
    ({"conv_kernel_size": 3, "conv_groups": 5}, "not a multiple of conv_groups 5"),
    ({"conv_kernel_size": 3, "conv_act": "gelux"}, "did you mean 'gelu'"),
    ({"position_buckets": 1}, "position_buckets 1 must be 2 at least"),
    ({"max_relative_positions": 4}, "max_relative_positions, 4, more than half"),
    ({"share_att_key": "yes"}, "share_att_key must be true or false"),
    ({"is_decoder": True}, "is_decoder=True is not supported"),
  ],
)
def test_a_config_that_we_cannot_honour_is_an_error(fields, message):
  with pytest.raises(lx.LoraxError, match=message):
    deberta.from_hf({**V3, **fields})


def test_a_text_longer_than_the_positions_is_an_error(tmp_path):
  save(tmp_path, SPLIT)
  with pytest.raises(lx.LoraxError, match="24 tokens: the model takes at most 23"):
    family.logits(registry.load(tmp_path), batch(24))


@pytest.mark.parametrize(
  ("name", "draws"),
  [
    # The embeddings, the convolution; in each layer the table, that is shared by the
    # batch, and what attention and the MLP add.
    ("hidden_dropout_prob", [(9, 12)] * 2 + [(3, 5, 12)] * 6),
    ("attention_probs_dropout_prob", [(3, 3, 5, 5)] * 2),
    ("pooler_dropout", [(3, 12)]),
    ("cls_dropout", [(3, 12)]),
  ],
)
def test_each_dropout_rate_drops_where_it_is_set(name, draws):
  rates = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
  rates = dict.fromkeys([*rates, "pooler_dropout", "cls_dropout"], 0.0)
  hf_config = {**V2, **rates, name: 0.5}
  config = deberta.from_hf(hf_config)
  member = deberta.FAMILIES["deberta-v2"]
  module = member.build(config, "float32", False, "none")

  def forward(params, key, inputs):
    rngs = {"dropout": key}
    return module.apply({"params": params}, **inputs, deterministic=False, rngs=rngs)

  inputs = {n: x for n, x in batch(5).items() if n != "token_type_ids"}
  program = jax.make_jaxpr(forward)(member.shapes(module), jax.random.key(0), inputs)
  assert sorted(_draws(program.jaxpr), key=lambda x: (len(x), x)) == draws


def _draws(jaxpr):
  """Shapes of the random numbers that a program draws."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "random_bits":
      yield eqn.outvars[0].aval.shape
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _draws(inner)


def test_without_a_rate_of_its_own_the_classifier_has_the_layers():
  asked = {"cls_dropout": None, "hidden_dropout_prob": 0.3}
  assert deberta.from_hf({**V2, **asked}).head_dropout == 0.3
  assert deberta.from_hf({**V2, "cls_dropout": 0.0}).head_dropout == 0.0


def test_bfloat16_is_close(tmp_path):
  model = save(tmp_path, V2, initializer_range=0.05)
  got = family.logits(registry.load(tmp_path, dtype="bfloat16"), batch())
  np.testing.assert_allclose(got, family.torch_logits(model, batch()), atol=0.05)
