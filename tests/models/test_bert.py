"""BERT and RoBERTa against transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.resolve import resolve
from lorax_flax.models import registry
from tests.models import peers

TOLERANCE = 1e-4


def ours(loaded, inputs):
  apply = jax.jit(loaded.module.apply)
  return np.asarray(apply({"params": loaded.params}, *inputs.values()))


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_logits_equal_transformers(tmp_path, family, scan, labels):
  model = peers.save(tmp_path, family, num_labels=labels)
  loaded = registry.load(tmp_path, scan=scan)
  assert not loaded.new_paths
  for length in (1, 11, 19):
    inputs = peers.batch(family, length=length, rows=1 if length == 1 else 3)
    want = peers.logits(model, inputs)
    np.testing.assert_allclose(ours(loaded, inputs), want, atol=TOLERANCE)


@pytest.mark.parametrize("act", ["relu", "gelu_new", "silu"])
def test_activations_equal_transformers(tmp_path, act):
  model = peers.save(tmp_path, hidden_act=act)
  inputs = peers.batch()
  got = ours(registry.load(tmp_path), inputs)
  np.testing.assert_allclose(got, peers.logits(model, inputs), atol=TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("remat", ["full", "inputs"])
def test_gradients_equal_torch_with_scan_and_remat(tmp_path, family, remat):
  model = peers.save(tmp_path, family, num_labels=3)
  inputs = peers.batch(family)
  loaded = registry.load(tmp_path, scan=True, remat=remat)

  def loss(params):
    return jnp.sum(jnp.sin(loaded.module.apply({"params": params}, *inputs.values())))

  grads = jax.jit(jax.grad(loss))(loaded.params)
  tensors = {k: torch.tensor(v).long() for k, v in inputs.items()}
  torch.sin(model(**tensors).logits).sum().backward()
  got = {k: v.copy() for k, v in export.to_tensors(grads, loaded.keymap).items()}
  want = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
  assert got.keys() == want.keys()
  pad = loaded.config.pad_token_id  # torch forms no gradient of the padding's rows
  rows = ["word_embeddings"] + ["position_embeddings"] * (family == "roberta")
  for name in rows:
    key = f"{family}.embeddings.{name}.weight"
    want[key][pad], got[key][pad] = 0, 0
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=TOLERANCE, err_msg=name)


def test_real_minilm_equals_transformers():
  folder = resolve("minilm")
  model = transformers.BertModel.from_pretrained(folder).eval()
  inputs = peers.batch(length=40, vocab=30522)
  loaded = registry.load(folder, num_labels=2)
  assert set(loaded.new_paths) == {"classifier/kernel", "classifier/bias"}
  tensors = {k: torch.tensor(v).long() for k, v in inputs.items()}
  with torch.no_grad():
    pooled = model(**tensors).pooler_output.numpy()
  head = loaded.params["classifier"]
  want = pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
  # A new head's logits are small, 0.03 here.
  np.testing.assert_allclose(ours(loaded, inputs), want, atol=1e-6)


def test_sharded_checkpoints_are_read(tmp_path):
  model = peers.save(tmp_path, max_shard_size="8KB")
  assert (tmp_path / "model.safetensors.index.json").exists()
  inputs = peers.batch()
  got = ours(registry.load(tmp_path), inputs)
  np.testing.assert_allclose(got, peers.logits(model, inputs), atol=TOLERANCE)


@pytest.mark.parametrize("prefix", ["", "model.bert."])
def test_any_prefix_is_read(tmp_path, prefix):
  model = peers.save(tmp_path)
  edit(tmp_path, lambda t: {k.replace("bert.", prefix): v for k, v in t.items()})
  inputs = peers.batch()
  got = ours(registry.load(tmp_path), inputs)
  np.testing.assert_allclose(got, peers.logits(model, inputs), atol=TOLERANCE)


def test_bfloat16_is_close(tmp_path):
  model = peers.save(tmp_path, initializer_range=0.05)
  inputs = peers.batch()
  got = ours(registry.load(tmp_path, dtype="bfloat16"), inputs)
  np.testing.assert_allclose(got, peers.logits(model, inputs), atol=0.05)


def test_bfloat16_casts_the_rows_looked_up_and_not_the_table(tmp_path):
  peers.save(tmp_path)
  loaded = registry.load(tmp_path, dtype="bfloat16")
  table = loaded.params["embeddings"]["word_embeddings"]["embedding"]
  inputs = peers.batch().values()
  jaxpr = str(jax.make_jaxpr(loaded.module.apply)({"params": loaded.params}, *inputs))
  vocab, dim = table.shape
  assert f"f32[{vocab},{dim}]" in jaxpr
  assert f"bf16[{vocab},{dim}]" not in jaxpr


def test_dropout_needs_a_key_and_changes_the_logits(tmp_path):
  peers.save(tmp_path)
  loaded = registry.load(tmp_path)
  inputs = peers.batch()

  def apply(seed):
    return loaded.module.apply(
      {"params": loaded.params},
      *inputs.values(),
      deterministic=False,
      rngs={"dropout": jax.random.key(seed)},
    )

  assert not np.allclose(apply(0), apply(1))
  np.testing.assert_array_equal(apply(0), apply(0))


def test_every_leaf_has_named_axes(tmp_path):
  peers.save(tmp_path)
  module = registry.load(tmp_path, scan=True).module
  axes = registry.FAMILIES["bert"].logical_axes(module)
  assert tuple(axes["encoder"]["layers"]["attention"]["query"]["kernel"]) == (
    "layers",
    "embed",
    "heads",
  )
  shapes = jax.tree.map(lambda x: len(x.shape), registry.load(tmp_path).params)
  flat = registry.FAMILIES["bert"].logical_axes(registry.load(tmp_path).module)
  assert jax.tree.map(lambda n, spec: len(spec) == n, shapes, flat) == jax.tree.map(
    lambda n: True, shapes
  )


def edit(folder, change):
  """Rewrites model.safetensors."""
  path = folder / "model.safetensors"
  tensors = change({k: v.copy() for k, v in load_file(path).items()})
  save_file(tensors, path, metadata={"format": "pt"})


def drop(name):
  return lambda t: {k: v for k, v in t.items() if name not in k}


def rename(old, new):
  return lambda t: {k.replace(old, new): v for k, v in t.items()}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (drop("layer.1.attention.self.query.bias"), r"lacks 1 keys.*nearest there"),
    (rename("pooler.dense", "pooler.dnse"), r"did you mean.*pooler.dense"),
    (
      lambda t: t | {"bert.pooler.dense.weight": np.zeros((12, 11), np.float32)},
      r"'bert.pooler.dense.weight' has shape \(12, 11\)",
    ),
    (drop("word_embeddings"), "no bert checkpoint: missing key"),
  ],
)
def test_a_checkpoint_that_does_not_fit_names_what_is_wrong(tmp_path, change, message):
  peers.save(tmp_path)
  edit(tmp_path, change)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


def test_a_head_of_another_width_is_replaced_only_when_asked(tmp_path):
  peers.save(tmp_path, num_labels=3)
  with pytest.raises(lx.LoraxError, match=r"classifier.*new_head=True"):
    registry.load(tmp_path, num_labels=2)
  loaded = registry.load(tmp_path, num_labels=2, new_head=True)
  assert set(loaded.new_paths) == {"classifier/kernel", "classifier/bias"}


def test_a_new_head_depends_on_the_seed_and_nothing_else(tmp_path):
  peers.save(tmp_path)
  edit(tmp_path, drop("classifier"))
  one, two, three = (registry.load(tmp_path, seed=s).params for s in (1, 1, 2))
  kernels = [p["classifier"]["kernel"] for p in (one, two, three)]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[0], kernels[2])


@pytest.mark.parametrize(
  ("field", "value"),
  [("position_embedding_type", "relative_key"), ("is_decoder", True)],
)
def test_a_config_that_we_cannot_honour_is_an_error(tmp_path, field, value):
  peers.save(tmp_path)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(lx.LoraxError, match=field):
    registry.load(tmp_path)


def test_damaged_files_are_one_clear_error(tmp_path):
  peers.save(tmp_path)
  path = tmp_path / "model.safetensors"
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(lx.LoraxError, match="cannot read"):
    registry.load(tmp_path)
  path.unlink()
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
  with pytest.raises(lx.LoraxError, match="not a file of its folder"):
    registry.load(tmp_path)
  index.unlink()
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(lx.LoraxError, match="pickled"):
    registry.load(tmp_path)
