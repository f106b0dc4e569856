"""loralib's state dicts against loralib itself; the released file where it is there.

Facts that the peer does not test: neither alpha nor enable_lora is in a file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import loralib
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError
from lorax_flax.hub.adapters import loralib as hub_loralib
from lorax_flax.hub.checkpoints.entries import CONV_2D, Entry, embedding, linear
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.files import torch_file
from lorax_flax.models import registry
from lorax_flax.models.bert import keys as bert_keys
from tests.hub import roberta_lora, trees
from tests.models import family

ALPHA = 6.0
ENABLE = [True, False, True]
VOCAB, DIM, LAYERS = 11, 6, 2


class Net(torch.nn.Module):
  """An embedding, fused kernels of both orientations in each layer, a head."""

  def __init__(self, enable=ENABLE, rank=2, alpha=ALPHA):
    super().__init__()
    common = {"r": rank, "lora_alpha": alpha, "merge_weights": False}
    fused = {"enable_lora": enable, **common}
    self.embed = loralib.Embedding(VOCAB, DIM, **common)
    self.layer = torch.nn.ModuleList(
      torch.nn.ModuleDict(
        {
          "fused": loralib.MergedLinear(DIM, 3 * DIM, fan_in_fan_out=True, **fused),
          "turned": loralib.MergedLinear(3 * DIM, 6 * DIM, **fused),
          "plain": loralib.Linear(6 * DIM, DIM, **common),
        }
      )
      for _ in range(LAYERS)
    )
    self.head = torch.nn.Linear(DIM, 4)

  def forward(self, ids):
    x = self.embed(ids)
    for layer in self.layer:
      x = x + layer["plain"](torch.tanh(layer["turned"](layer["fused"](x))))
    return self.head(x)


def _keymap(scan):
  rows = (
    embedding("embed", "embed"),
    Entry("layer_{i}/fused/kernel", "layer.{i}.fused.weight"),  # stored (in, out)
    Entry("layer_{i}/fused/bias", "layer.{i}.fused.bias"),
    *linear("layer_{i}/turned", "layer.{i}.turned"),
    *linear("layer_{i}/plain", "layer.{i}.plain"),
    *linear("head", "head", part="head"),
  )
  return KeyMap("net", "", rows, {"i": LAYERS}, scan, "embed.weight")


def _dense(p, x_BxTxD):
  return x_BxTxD @ p["kernel"] + jnp.expand_dims(p["bias"], (0, 1))


def _apply(params, ids):
  x = params["embed"]["embedding"][ids]

  def layer(x, p):
    inner = jnp.tanh(_dense(p["turned"], _dense(p["fused"], x)))
    return x + _dense(p["plain"], inner), None

  if "layers" in params:
    x, _ = jax.lax.scan(layer, x, params["layers"])
  else:
    for i in range(LAYERS):
      x, _ = layer(x, params[f"layer_{i}"])
  return _dense(params["head"], x)


def _net(seed=0, **options):
  torch.manual_seed(seed)
  net = Net(**options)
  with torch.no_grad():
    for parameter in net.parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.3)
  return net.eval()


def _save(net, folder, more=lambda key: key.startswith("head")):
  tensors = loralib.lora_state_dict(net)
  tensors |= {k: v for k, v in net.state_dict().items() if more(k)}
  torch.save(tensors, folder / "lora.pt")
  return folder / "lora.pt"


@pytest.fixture
def net():
  return _net()


@pytest.fixture
def file(net, tmp_path):
  return _save(net, tmp_path)


@pytest.fixture
def base(net):
  keymap = _keymap(scan=False)
  return trees.params(net, keymap), keymap


IDS = np.arange(2 * 5).reshape(2, 5) % VOCAB


@pytest.mark.parametrize(
  ("enable", "scan"),
  [
    (ENABLE, False),
    (ENABLE, True),
    ([True, True, True], False),
    ([False, True, False], False),
  ],
)
def test_every_layer_computes_as_loralib_does(enable, scan, tmp_path):
  net, keymap = _net(enable=enable), _keymap(scan)
  params = trees.params(net, keymap)
  head = params.pop("head")  # the file's own must replace it
  params["head"] = jax.tree.map(jnp.zeros_like, head)
  adapter, config = hub_loralib.read_adapter(
    _save(net, tmp_path), params, keymap, alpha=ALPHA, enable_lora=enable
  )
  with torch.no_grad():
    want = net(torch.tensor(IDS)).numpy()
  assert np.abs(want).max() > 0.5
  got = jax.jit(_apply)(lx.merge(params, adapter), IDS)
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
  # Unmerged too, by what the config itself makes of the model.
  lora = lx.adapt(_apply, config)
  fresh = lora.init(jax.random.key(0), params, IDS)
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, adapter)
  for path, delta in adapter.items():
    if isinstance(delta, lx.LoRA):
      np.testing.assert_allclose(delta.scale, fresh[path].scale, rtol=1e-6)
  got = jax.jit(lora.apply)(params, adapter, IDS)
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_loralib_reads_what_we_write(scan, net, file, tmp_path):
  keymap = _keymap(scan)
  params = trees.params(net, keymap)
  adapter, _ = hub_loralib.read_adapter(
    file, params, keymap, alpha=ALPHA, enable_lora=ENABLE
  )
  alpha = hub_loralib.write_adapter(
    tmp_path / "out", adapter, keymap, enable_lora=ENABLE
  )
  assert alpha == pytest.approx(ALPHA)
  got = torch.load(tmp_path / "out" / hub_loralib.FILE, weights_only=True)
  want = torch.load(file, weights_only=True)
  assert got.keys() == want.keys()
  for key, tensor in want.items():
    assert torch.equal(got[key], tensor), key
  other = _net(seed=0)
  report = other.load_state_dict(got, strict=False)
  assert not report.unexpected_keys


def test_modules_of_other_alphas_are_folded_into_their_b(net, tmp_path):
  keymap = _keymap(scan=False)
  params = trees.params(net, keymap)
  config = lx.LoraConfig(
    targets=".*plain/kernel|embed/embedding",
    rank=3,
    alpha=6,
    alpha_pattern={"layer_1/plain": 1.5},
    rank_pattern={"layer_0/plain": 2},
  )
  lora = lx.adapt(_apply, config)
  adapter = lora.init(jax.random.key(0), params, IDS)
  adapter = jax.tree.map(
    lambda x: (
      x + 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
      if x.ndim
      else x
    ),
    adapter,
  )
  alpha = hub_loralib.write_adapter(tmp_path / "out", adapter, keymap)
  assert alpha == 6
  again, _ = hub_loralib.read_adapter(
    tmp_path / "out" / hub_loralib.FILE, params, keymap, alpha=alpha
  )
  want = flatten(lx.merge(params, adapter))
  for path, leaf in flatten(lx.merge(params, again)).items():
    np.testing.assert_allclose(leaf, want[path], atol=1e-6, err_msg=path)


def test_safetensors_read_as_the_pickled_file_does(net, file, base, tmp_path):
  tensors = torch.load(file, weights_only=True)
  save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
  read = lambda path: hub_loralib.read_adapter(
    path, *base, alpha=ALPHA, enable_lora=ENABLE
  )
  want, got = read(file), read(tmp_path / "x.safetensors")
  assert got[1] == want[1]
  jax.tree.map(np.testing.assert_array_equal, got[0], want[0])


@pytest.mark.parametrize(
  ("more", "bias"),
  [
    (lambda key: False, "none"),
    (lambda key: key.endswith("bias") and "layer" in key, "lora_only"),
    (lambda key: key.endswith("bias"), "all"),
  ],
)
def test_biases_are_named_as_loralib_names_them(more, bias, net, base, tmp_path):
  assert more("head.bias") == (bias == "all")
  adapter, config = hub_loralib.read_adapter(
    _save(net, tmp_path, more), *base, alpha=1, enable_lora=ENABLE
  )
  assert config.bias == bias
  tuned = [path for path, delta in adapter.items() if isinstance(delta, lx.Tuned)]
  assert len(tuned) == {"none": 0, "lora_only": 6, "all": 7}[bias]


def _changed(file, **tensors):
  state = torch.load(file, weights_only=True) | tensors
  torch.save({k: v for k, v in state.items() if v is not None}, file)
  return file


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    ({}, {"enable_lora": None}, "MergedLinear.*enable_lora.*true,false,true"),
    ({}, {"enable_lora": [True, False]}, r"do not fit enable_lora=\[True, False\]"),
    ({}, {"enable_lora": [True] * 3}, "do not fit enable_lora"),
    ({}, {"enable_lora": [False] * 3}, "do not fit enable_lora"),
    ({}, {"enable_lora": []}, r"do not fit enable_lora=\[\]"),
    ({}, {"alpha": 0.0}, "above 0"),
    ({"embed.lora_A": None}, {}, "embed has lora_B alone"),
    ({"embed.lora_A": torch.ones(2, VOCAB + 1)}, {}, "do not fit together"),
    ({"embed.lora_A": torch.ones(2, 3, 4)}, {}, "do not fit together"),
    ({"embed.lora_A": torch.ones(())}, {}, "do not fit together"),
    ({"embed.lora_B": torch.ones(DIM, 5)}, {}, "do not fit"),
    ({"embed.lora_B": torch.ones(DIM, 2).long()}, {}, "int64, not floating"),
    ({"embbed.lora_A": torch.ones(2, VOCAB)}, {}, "did you mean 'embed'"),
    ({"hed.weight": torch.ones(2, 2)}, {}, "did you mean 'head.weight'"),
    ({"head.weight": torch.ones(2, 2)}, {}, r"shape \(2, 2\), and \(4, 6\)"),
  ],
)
def test_what_does_not_fit_is_one_clear_error(change, options, message, file, base):
  options = {"alpha": ALPHA, "enable_lora": ENABLE, **options}
  with pytest.raises(LoraxError, match=message) as error:
    hub_loralib.read_adapter(_changed(file, **change), *base, **options)
  if "alpha" not in message and "above" not in message:
    assert str(error.value).count(str(file)) == 1


def test_enable_lora_that_nothing_needs_is_an_error(net, base, tmp_path):
  linear_only = {"embed.lora_A": torch.ones(2, VOCAB), "embed.lora_B": torch.ones(6, 2)}
  torch.save(linear_only, tmp_path / "x.pt")
  with pytest.raises(LoraxError, match="no module here is a MergedLinear"):
    hub_loralib.read_adapter(tmp_path / "x.pt", *base, alpha=1, enable_lora=ENABLE)
  adapter, _ = hub_loralib.read_adapter(tmp_path / "x.pt", *base, alpha=1)
  with pytest.raises(LoraxError, match="fits no delta"):
    hub_loralib.to_state_dict(adapter, base[1], enable_lora=ENABLE)


def test_convolutions_and_other_files_are_refused_by_name(base, tmp_path):
  conv = (Entry("conv/kernel", "conv.weight", CONV_2D),)
  keymap = KeyMap("net", "", conv, {}, False, "conv.weight")
  params = {"conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32)}}
  state = {"conv.lora_A": torch.ones(6, 6), "conv.lora_B": torch.ones(12, 6)}
  torch.save(state, tmp_path / "x.pt")
  with pytest.raises(LoraxError, match="conv is a conv: of loralib's layers"):
    hub_loralib.read_adapter(tmp_path / "x.pt", params, keymap, alpha=1)
  torch.save({"embed.weight": torch.ones(2)}, tmp_path / "y.pt")
  assert not hub_loralib.is_state_dict(tmp_path / "y.pt")
  with pytest.raises(LoraxError, match=r"no lora_A.*It holds: embed\.weight"):
    hub_loralib.read_adapter(tmp_path / "y.pt", *base, alpha=1)
  (tmp_path / "z").write_text("not a file of tensors")
  assert not hub_loralib.is_state_dict(tmp_path / "z")
  with pytest.raises(LoraxError, match="neither torch's zip format nor safetensors"):
    hub_loralib.read_adapter(tmp_path / "z", *base, alpha=1)
  with pytest.raises(LoraxError, match="no file"):
    hub_loralib.read_adapter(tmp_path / "none", *base, alpha=1)


def test_deltas_that_loralib_has_no_layer_for_are_refused(base):
  params, keymap = base
  config = lx.LoraConfig(targets=["plain"], use_dora=True)
  adapter = lx.adapt(_apply, config).init(jax.random.key(0), params, IDS)
  with pytest.raises(LoraxError, match="no layer for the DoRA of layer_0/plain/kernel"):
    hub_loralib.to_state_dict(adapter, keymap)
  with pytest.raises(LoraxError, match="one low-rank delta at least"):
    hub_loralib.to_state_dict({}, keymap)


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_fits_a_roberta_base(scan, loralib_file):
  module_shapes = registry.FAMILIES["roberta"]
  config = module_shapes.configure(
    transformers.RobertaConfig(
      vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=3
    ).to_dict()
  )
  shapes = module_shapes.shapes(module_shapes.build(config, jnp.float32, scan, "none"))
  keymap = bert_keys.keymap("roberta", 12, scan)
  assert hub_loralib.num_labels(loralib_file, keymap) == 3
  adapter, config = hub_loralib.read_adapter(loralib_file, shapes, keymap, alpha=16)
  deltas = {p: d for p, d in adapter.items() if isinstance(d, lx.LoRA)}
  assert len(deltas) == (2 if scan else 24)
  assert {d.rank for d in deltas.values()} == {8}
  assert {float(d.scale) for d in deltas.values()} == {2.0}
  assert len(adapter) - len(deltas) == 4
  assert (config.rank, config.alpha) == (8, 16)


def test_an_adapter_of_roberta_base_gives_loralibs_logits(loralib_file, tmp_path):
  model = roberta_lora.adapt(family.save(tmp_path / "base", roberta_lora.base()))
  state = torch.load(loralib_file, map_location="cpu", weights_only=True)
  assert not model.load_state_dict(state, strict=False).unexpected_keys
  loaded = registry.load(tmp_path / "base")
  adapter, _ = hub_loralib.read_adapter(
    loralib_file, loaded.params, loaded.keymap, alpha=16
  )
  ids = np.arange(2 * 9).reshape(2, 9).astype(np.int32) % 27 + 3
  inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
  want = family.torch_logits(model.eval(), inputs)
  before = family.logits(loaded, inputs)
  merged = lx.merge(loaded.params, adapter)
  got = family.logits(dataclasses.replace(loaded, params=merged), inputs)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(want - before).max() > 0.1
  # And out again, under the same keys, with the same bytes.
  alpha = hub_loralib.write_adapter(tmp_path / "out", adapter, loaded.keymap)
  assert alpha == 16
  again = torch_file.read(tmp_path / "out" / hub_loralib.FILE)
  assert again.keys() == state.keys()
  for key, tensor in state.items():
    np.testing.assert_array_equal(again[key], tensor.numpy())
