"""The receipt of a merge: the share of the change that what is written keeps."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file

from experiments.merge import merge
from lorax_flax import quant
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError
from lorax_flax.models import registry, with_adapter
from tests.experiments import own_text, peers
from tests.quant import checkpoints


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A base, an adapter of a change that float32 keeps, a much smaller one, and none."""
  root = tmp_path_factory.mktemp("merge")
  own_text.decoder(root / "base", width=128)
  for name in ("adapter", "small", "none"):
    model = transformers.LlamaForCausalLM.from_pretrained(root / "base")
    fields = {"modules_to_save": None, "target_modules": ["q_proj", "down_proj"]}
    peers.adapt(model, root / name, **fields)
  for name, factor in (("small", 0.02), ("none", 0.0)):
    file = root / name / "adapter_model.safetensors"
    save_file({key: x * factor for key, x in load_file(file).items()}, file)
  return root


def _merged(root, name, out, **options):
  return merge(str(root / "base"), str(root / name), str(out), **options)


def _leaves(folder, form=None):
  leaves = flatten(registry.load(folder, quant=form).params)
  return {path: np.asarray(quant.dense(x), np.float32) for path, x in leaves.items()}


def _share(root, name, before, after, form=None):
  """The share of an adapter's change that there is between two models."""
  adapter = with_adapter.load(str(root / "base"), root / name)[1].adapter
  base, products = _leaves(root / "base", form), []
  for path, delta in adapter.items():
    change = np.asarray(delta.merged(jnp.asarray(base[path]))) - base[path]
    left = after[path] - before[path]
    products.append(((left * change).sum(), (change * change).sum()))
  return np.divide(*np.sum(products, 0)), min(x / y for x, y in products)


def test_float32_keeps_all(root, tmp_path):
  receipt = _merged(root, "adapter", tmp_path / "out")
  assert json.loads((tmp_path / "out/receipt.json").read_text()) == json.loads(
    json.dumps(receipt)
  )
  assert receipt["stored"]["kept"] == pytest.approx(1, abs=1e-4)
  assert receipt["stored"]["largest_logit_difference"] < 1e-3
  assert "requantized" not in receipt


def test_a_change_that_is_rounded_away_is_refused(root, tmp_path):
  with pytest.raises(LoraxError, match=r"keep [\d.]+% of the adapter's change.*proj"):
    _merged(root, "small", tmp_path / "out", form="gguf", dtype="q8_0")
  assert not (tmp_path / "out").exists()
  options = {"form": "gguf", "dtype": "q8_0", "min_kept": 0.0}
  receipt = _merged(root, "small", tmp_path / "out", **options)
  assert receipt["stored"]["largest_logit_difference"] > 1e-4
  _merged(root, "none", tmp_path / "none", form="gguf", dtype="q8_0")
  read = (_leaves(tmp_path / folder) for folder in ("none", "out"))
  share, least = _share(root, "small", *read)
  assert receipt["stored"]["kept"] == pytest.approx(share, abs=1e-3)
  assert receipt["stored"]["least"][0] == pytest.approx(least, abs=1e-3)
  assert share < 0.99


def test_a_quantised_base_is_merged_as_its_dense_kernels(root, tmp_path):
  checkpoints.write_dense(tmp_path / "dense", root / "base", "nf4")
  receipt = _merged(root, "adapter", tmp_path / "out", quant="nf4")
  merge(str(tmp_path / "dense"), str(root / "adapter"), str(tmp_path / "float"))
  got, want = (load_file(tmp_path / f"{n}/model.safetensors") for n in ("out", "float"))
  assert got.keys() == want.keys()
  for key, value in got.items():
    np.testing.assert_allclose(value, want[key], atol=1e-6)
  assert receipt["stored"]["kept"] == pytest.approx(1, abs=1e-4)
  # Quantised again, the share is what the kernels themselves say.
  again = receipt["requantized"]
  share, _ = _share(
    root,
    "adapter",
    _leaves(root / "base", "nf4"),
    _leaves(tmp_path / "out", "nf4"),
    "nf4",
  )
  assert again["kept"] == pytest.approx(share, abs=1e-3)
  assert share < 0.999
  assert again["largest_logit_difference"] > 1e-3
