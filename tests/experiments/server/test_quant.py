"""A quantised base that is served: the answers of its dequantised kernels."""

import json

import pytest
from starlette.testclient import TestClient

from experiments.generate import generate
from experiments.predict import predict
from experiments.server import app, start
from lorax_flax.adapt.paths import flatten
from lorax_flax.models import registry
from lorax_flax.quant import is_quantized
from lorax_flax.serve.settings import Decoding
from tests.experiments import peers
from tests.experiments.server.conftest import SETTINGS
from tests.quant import checkpoints

PROMPT, NEW = "one two", 6


def _served(base, adapters):
  loaded = registry.load(base, quant="int8")
  assert any(map(is_quantized, flatten(loaded.params).values()))
  return start.served(loaded, base.name, adapters, language=SETTINGS, quant="int8")


def _text(base, adapter, folder):
  (folder / "in.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
  adapter, out = adapter and str(adapter), folder / "out.jsonl"
  decoding = Decoding(max_new_tokens=NEW)
  generate(str(base), adapter, str(folder / "in.jsonl"), str(out), decoding)
  return json.loads(out.read_text())["text"]


def _embedding(client):
  body = {"model": "tiny", "input": [PROMPT]}
  answer = client.post("/v1/embeddings", json=body)
  return answer.json()["data"][0]["embedding"]


@pytest.mark.parametrize("mixed", [True, False])
def test_texts_are_those_of_the_dense_kernels(root, tmp_path, mixed):
  checkpoints.write_dense(tmp_path / "tiny", root / "tiny", "int8")
  made = _served(root / "tiny", root / "adapters" if mixed else None)
  dense = start.served(
    registry.load(tmp_path / "tiny"), "tiny", None, language=SETTINGS
  )
  try:
    client = TestClient(app.create(made))
    for name in ("tiny", "first") if mixed else ("tiny",):
      body = {"model": name, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
      answer = client.post("/v1/completions", json=body)
      adapter = None if name == "tiny" else root / "adapters" / name
      expected = _text(tmp_path / "tiny", adapter, tmp_path)
      assert answer.json()["choices"][0]["text"] == expected
    expected = _embedding(TestClient(app.create(dense)))
    assert _embedding(client) == pytest.approx(expected, abs=1e-4)
  finally:
    made.close()
    dense.close()


def test_scores_are_those_of_the_dense_kernels(tmp_path):
  base, lines = tmp_path / "base", tmp_path / "in.jsonl"
  model = peers.tiny("bert", base, names=peers.NAMES)
  peers.adapt(model, tmp_path / "adapters/one")
  checkpoints.write_dense(tmp_path / "dense", base, "int8")
  lines.write_text(json.dumps({"text": "no lemon"}) + "\n")
  made = _served(base, tmp_path / "adapters")
  for name, adapter in (("base", None), ("one", str(tmp_path / "adapters/one"))):
    out = tmp_path / f"{name}.jsonl"
    predict(str(tmp_path / "dense"), adapter, str(lines), str(out))
    expected = json.loads(out.read_text())
    found = made.scores(name, ["no lemon"])
    best = found.labels.index(expected["label"])
    assert found.scores_NxC[0, best] == pytest.approx(expected["score"], abs=1e-5)
  # One base for both: the kernels that neither trains are the same arrays.
  one, two = (flatten(made._served[n].classifier.model.params) for n in ("base", "one"))
  shared = [path for path, leaf in one.items() if is_quantized(leaf)]
  assert len(shared) == 12
  assert all(one[path] is two[path] for path in shared)
