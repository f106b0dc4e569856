"""A GGUF file as a quantised base: its blocks in memory, and no other numbers."""

import gguf
import jax
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax import quant
from lorax_flax.adapt.paths import flatten
from lorax_flax.hub.files import gguf_blocks
from lorax_flax.models import registry
from lorax_flax.models.settings import ModelSettings
from tests.hub.files import test_gguf
from tests.models import family

KERNEL = "model/layer_1/mlp/up_proj/kernel"
Kind = gguf.GGMLQuantizationType
INPUTS = dict(
  zip(("input_ids", "attention_mask"), family.tokens(9, 4, 40), strict=True)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return test_gguf.peer(tmp_path_factory.mktemp("source"))


def written(folder, model, **kinds):
  """A file of Q8_0, but for tensors whose names have a key of `kinds` in them."""
  tensors, plain = (test_gguf.stored(model, kind) for kind in (Kind.Q8_0, Kind.F32))
  for name in tensors:
    for part, kind in kinds.items():
      if part in name:
        tensors[name] = (gguf.quants.quantize(plain[name][0], kind), kind)
  return test_gguf.write(folder / "m.gguf", tensors, test_gguf.values(model))


def logits(loaded):
  apply = lambda params, x: loaded.module.apply({"params": params}, **x)
  return jax.jit(lx.adapt(apply, lx.LoraConfig()).apply)(loaded.params, {}, INPUTS)


@pytest.mark.parametrize("scan", [False, True])
def test_a_file_is_its_own_quantised_base(model, tmp_path, scan, monkeypatch):
  # All layers of one kind, of another, and of none.
  kinds = {"ffn_down": Kind.Q4_0, "attn_v": Kind.F16, "attn_q": Kind.Q4_1}
  path = written(tmp_path, model, **kinds)
  dense = registry.load(path, scan=scan)
  dequantised = []
  whole = gguf_blocks.rows

  def rows(descriptor, stored, low, high):
    dequantised.append(stored.shape)
    return whole(descriptor, stored, low, high)

  monkeypatch.setattr(gguf_blocks, "rows", rows)
  loaded = registry.load(path, scan=scan, quant="as_stored")
  # The table and the head alone, the weights that are numbers, and the norms.
  vocabulary, size = 300, 64
  assert {s for s in dequantised if len(s) > 1} == {(vocabulary, size), (32, size)}
  leaves, expected = flatten(loaded.params), flatten(dense.params)
  names = {p.split("/")[-2]: quant.name_of(x) for p, x in leaves.items()
           if quant.is_quantized(x)}  # fmt: skip
  assert names == {
    **dict.fromkeys(("k_proj", "o_proj", "gate_proj", "up_proj"), "q8_0"),
    "q_proj": "q4_1",
    "down_proj": "q4_0",
  }
  for name, leaf in leaves.items():
    np.testing.assert_allclose(quant.dense(leaf), expected[name], atol=1e-6)
  np.testing.assert_allclose(logits(loaded), logits(dense), rtol=1e-4, atol=3e-5)


def test_what_can_not_be_kept_is_named(model, tmp_path):
  path = written(tmp_path, model, **{"blk.1.ffn_up": Kind.Q4_0})
  loaded = registry.load(path, quant="as_stored")
  assert quant.name_of(flatten(loaded.params)[KERNEL]) == "q4_0"
  with pytest.raises(lx.LoraxError, match=r"layers/mlp/up_proj.*q4_0.*scan=False"):
    registry.load(path, scan=True, quant="as_stored")
  path = written(tmp_path, model, ffn_up=Kind.Q5_0)
  with pytest.raises(lx.LoraxError, match=r"up_proj.*unknown format 'q5_0'.*q4_0"):
    registry.load(path, quant="as_stored")
  # Another format is made of the numbers, whatever they are stored as.
  made = flatten(registry.load(path, quant="q8_0").params)
  assert quant.name_of(made[KERNEL]) == "q8_0"
  model.save_pretrained(tmp_path / "numbers")
  with pytest.raises(lx.LoraxError, match="has no quantised kernel"):
    registry.load(tmp_path / "numbers", quant="as_stored")
  outline = registry.outline(registry.read_config(path))
  with pytest.raises(lx.LoraxError, match="without its file"):
    registry.abstract_params(outline, quant="as_stored")
  with pytest.raises(lx.LoraxError, match=r"model.quant 'as_store'.*did you mean"):
    ModelSettings(path="m", quant="as_store")
