"""Merged models as StableHLO, run by a process that has JAX and little else."""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import flatbuffers  # noqa: F401
import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from experiments.inference import merged
from experiments.merge import merge
from lorax_flax import quant
from lorax_flax.adapt.paths import flatten, map_with_path
from lorax_flax.errors import LoraxError
from tests.experiments import peers

# The format of the base's kernels in memory, by family.
FAMILIES = {
  "bert": None,
  "deberta-v2": None,
  "gpt2": "int8",
  "llama": None,
  "t5": None,
  "vit": None,
}
# What the README asks for, and what JAX imports.
PACKAGES = ("jax", "numpy", "safetensors", "flatbuffers")
PACKAGES += ("jaxlib", "ml_dtypes", "opt_einsum", "scipy")
# The README's code, and then inputs of other sizes.
RUN = """
import os, sys
from importlib import util
from safetensors.numpy import save_file
assert util.find_spec("lorax_flax") is None and util.find_spec("flax") is None
root = os.getcwd()
for family in sys.argv[1:]:
  os.chdir(f"{root}/{family}/out")
  code = open("README.md").read().split("```python")[1].split("```")[0]
  found = {}
  exec(code, found)
  other = found["load_file"](f"{root}/{family}/inputs")
  answers = found["logits"], found["model"](found["params"], other)
  answers = {str(i): found["np"].asarray(x) for i, x in enumerate(answers)}
  save_file(answers, f"{root}/{family}/answers")
"""
ROWS, LENGTH = 3, 5


def _draw(name, like):
  """A random input; text is padded at the ends of rows."""
  draws = np.random.default_rng(0)
  if like["dtype"] == "float32":
    return draws.standard_normal((ROWS, *like["shape"][1:]), np.float32)
  if name.endswith("mask"):
    seen = np.arange(LENGTH) < LENGTH - np.arange(ROWS)[:, None]
    return seen.astype(np.int32)
  most = 2 if name == "token_type_ids" else 24
  return draws.integers(most, size=(ROWS, LENGTH), dtype=np.int32)


def _ones(like):
  shape = [{"batch": 2}.get(n, 8) if isinstance(n, str) else n for n in like["shape"]]
  return np.ones(shape, like["dtype"])


def _expected(base, adapter, form, batches):
  """Logits of the merged model here, its weights dense."""
  loaded, deltas = merged.read(base, adapter, form)
  params = map_with_path(
    lambda _, leaf: quant.dense(leaf), lx.merge(loaded.params, deltas)
  )

  @jax.jit
  def logits(params, batches):
    return [loaded.module.apply({"params": params}, **inputs) for inputs in batches]

  return flatten(params), logits(params, batches)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A base, its adapter, and the merged model in out/, of each family."""
  root = tmp_path_factory.mktemp("stablehlo")
  for family, form in FAMILIES.items():
    base, adapter, out = (str(root / family / n) for n in ("base", "adapter", "out"))
    peers.adapt(peers.tiny(family, base), adapter)
    merge(base, adapter, out, "stablehlo", quant=form)
  return root


def _about(root, family):
  return json.loads((root / family / "out/params.json").read_text())


@pytest.fixture(scope="module")
def answers(root):
  """Logits of each family by a process that can't import this package."""
  links = root / "links"
  links.mkdir()
  for name in PACKAGES:
    (links / name).symlink_to(Path(util.find_spec(name).origin).parent)
  for libraries in Path(np.__file__).parents[1].glob("*.libs"):
    (links / libraries.name).symlink_to(libraries)
  for family in FAMILIES:
    inputs = {x["name"]: _draw(x["name"], x) for x in _about(root, family)["inputs"]}
    save_file(inputs, root / family / "inputs")
  done = subprocess.run(
    [sys.executable, "-S", "-P", "-c", RUN, *FAMILIES],
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(links)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return {family: load_file(root / family / "answers") for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_the_package_computes_the_merged_logits(
  root, answers, family
):
  about, folder = _about(root, family), root / family
  batches = [
    {x["name"]: _ones(x) for x in about["inputs"]},
    load_file(folder / "inputs"),
  ]
  base, adapter = str(folder / "base"), str(folder / "adapter")
  leaves, expected = _expected(base, adapter, FAMILIES[family], batches)
  for got, want in zip(answers[family].values(), expected, strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  # The order of arguments is JAX's of two dicts, and all are there.
  stored = load_file(folder / "out/model.safetensors")
  assert [row["name"] for row in about["params"]] == sorted(leaves)
  for row in about["params"]:
    value = stored.pop(row["name"])
    assert (list(value.shape), str(value.dtype)) == (row["shape"], row["dtype"])
    np.testing.assert_array_equal(value, leaves[row["name"]])
  assert not stored
  names = [row["name"] for row in about["inputs"]]
  assert names == sorted(batches[0])
  assert about["platforms"] == ["cpu", "cuda", "tpu"]


def test_tokenizer_labels_and_receipt_are_beside_it(root):
  about, out = _about(root, "bert"), root / "bert/out"
  assert about["labels"] == {str(i): f"LABEL_{i}" for i in range(3)}
  assert about["inputs"][0] == {
    "name": "attention_mask",
    "shape": ["batch", "length"],
    "dtype": "int32",
  }
  assert about["outputs"] == [
    {"name": "logits", "shape": ["batch", 3], "dtype": "float32"}
  ]
  assert "labels" not in _about(root, "llama")
  base = root / "bert/base"
  for file in ("tokenizer.json", "tokenizer_config.json"):
    assert (out / file).read_bytes() == (base / file).read_bytes()
  assert not (out / "config.json").exists(), "transformers would load it as its own"
  receipt = json.loads((out / "receipt.json").read_text())
  assert receipt["stored"]["kept"] == pytest.approx(1, abs=1e-3)
  assert transformers.AutoTokenizer.from_pretrained(out)("a man")["input_ids"]


def test_a_dtype_is_refused_and_a_folder_is_kept(root, tmp_path):
  base, adapter, out = (str(root / "bert" / n) for n in ("base", "adapter", "out"))
  with pytest.raises(LoraxError, match="--dtype is a GGUF file's"):
    merge(base, adapter, str(tmp_path / "out"), "stablehlo", dtype="q8_0")
  with pytest.raises(LoraxError, match="not empty"):
    merge(base, adapter, out, "stablehlo")
