"""A quantised base through the commands: the results of its dequantised kernels."""

import json

import numpy as np
import pytest

from experiments import run
from experiments.generate import generate
from experiments.inference import merged
from experiments.predict import predict
from lorax_flax import quant
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError
from lorax_flax.serve.settings import Decoding
from tests.experiments import commands, own_text
from tests.quant import checkpoints

STEPS = 3
LINES = [{"input_ids": [3, 7, 9]}, {"input_ids": [5]}, {"input_ids": [1, 2, 3, 4]}]


def _settings(base, data, **changes):
  changes = {"model.quant": "nf4", "train.steps": STEPS} | changes
  return own_text.shrunk("complete.py", base, data, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A base, it with kernels that nf4 has made, an adapter of a quantised run."""
  root = tmp_path_factory.mktemp("quant")
  own_text.decoder(root / "base", width=128)
  checkpoints.write_dense(root / "dense", root / "base", "nf4")
  data = own_text.write(root / "data", own_text.completions)
  made = {"lora.targets": "all-linear", "train.learning_rate": 0.1, "data.prompts": 2}
  run.run(_settings(root / "base", data, **made), root / "run")
  lines = "".join(json.dumps(line) + "\n" for line in LINES)
  (root / "in.jsonl").write_text(lines)
  return root


def _written(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_are_answered_while_it_trains(root):
  assert len(_written(root / "run/samples.jsonl")) >= 2


@pytest.mark.parametrize("adapted", [True, False])
def test_logits_are_those_of_the_dense_kernels(root, tmp_path, adapted):
  adapter = str(root / "run/adapter") if adapted else None
  found = []
  for base, name in (("base", "nf4"), ("dense", None), ("base", None)):
    out = tmp_path / f"{base}-{name}.jsonl"
    files = (str(root / base), adapter, str(root / "in.jsonl"), str(out))
    predict(*files, quant=name, other_base=base == "dense")
    found.append(np.array([line["logits"] for line in _written(out)]))
  np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
  assert np.abs(found[0] - found[2]).max() > 1e-3  # Quantising changes something.


@pytest.mark.parametrize("fields", [{}, {"beams": 2}], ids=str)
def test_texts_are_those_of_the_dense_kernels(root, tmp_path, fields):
  decoding = Decoding(max_new_tokens=6, **fields)
  found = []
  for base, name in (("base", "nf4"), ("dense", None)):
    out = tmp_path / f"{base}.jsonl"
    files = (str(root / "run/adapter"), str(root / "in.jsonl"), str(out))
    other_base = base == "dense"
    generate(str(root / base), *files, decoding, quant=name, other_base=other_base)
    found.append(_written(out))
  assert found[0] == found[1]


def test_the_kernels_stay_quantised_beside_the_adapter(root):
  model = merged.load(str(root / "base"), str(root / "run/adapter"), "int8")
  stored = {p for p, x in flatten(model.loaded.params).items() if quant.is_quantized(x)}
  assert model.rest is not None
  assert stored <= set(model.rest)
  assert len(stored) == 7 * model.loaded.config.num_hidden_layers


def test_what_is_trained_in_full_is_refused(root):
  data = {"lora.targets": (), "lora.tuned": ".*q_proj/kernel"}
  settings = _settings(root / "base", root / "data", **data)
  with pytest.raises(LoraxError, match=r"tuned: .*q_proj.*being quantised: load the"):
    run.run(settings, root / "full")


def test_the_flag_names_the_formats(root):
  done = commands.run(
    "experiments.predict",
    f"--base={root}",
    "--quant=nf5",
    "--input=a",
    f"--out={root}/b",
  )
  assert done.returncode == 1
  assert "nf4_single" in done.stderr
  assert "Traceback" not in done.stderr
