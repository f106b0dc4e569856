"""Classification over HTTP: each adapter's labels, with the scores of `predict`."""

import gc
import json

import jax
import pytest
from starlette.testclient import TestClient

from experiments.predict import predict
from experiments.server import app, start
from lorax_flax.adapt import paths
from lorax_flax.errors import LoraxError
from lorax_flax.models import registry
from tests.experiments import peers

TEXTS = ["was it a cat i saw", "no lemon", "a man a plan a canal panama", "melon"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("classify")
  model = peers.tiny("bert", root / "minute", names=peers.NAMES)
  peers.adapt(model, root / "adapters/three")
  peers.tiny("bert", root / "two-labels", num_labels=2)
  model = peers.tiny("bert", root / "two-labels", num_labels=2)
  peers.adapt(model, root / "adapters/two", r=2, target_modules=["value"])
  (root / "adapters/broken").mkdir()
  return root


def _served(root):
  loaded = registry.load(root / "minute")
  return start.served(loaded, "minute", root / "adapters", language={"waiting": 2})


@pytest.fixture(scope="module")
def client(root):
  return TestClient(app.create(_served(root)))


def test_scores_are_those_of_predict(client, root):
  (root / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
  assert len(client.get("/v1/models").json()["data"]) == 3
  for name in ("minute", "three", "two"):
    adapter = None if name == "minute" else str(root / "adapters" / name)
    out = root / f"{name}.jsonl"
    predict(str(root / "minute"), adapter, str(root / "in.jsonl"), str(out))
    expected = [json.loads(line) for line in out.read_text().splitlines()]
    answer = client.post("/v1/classify", json={"model": name, "input": TEXTS})
    assert answer.status_code == 200, answer.text
    found = answer.json()["data"]
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    for each, line in zip(found, expected, strict=True):
      assert each["scores"][each["label"]] == pytest.approx(line["score"], abs=1e-5)
      assert sum(each["probs"]) == pytest.approx(1, abs=1e-6)
    assert len(found[0]["probs"]) == (2 if name == "two" else 3)


@pytest.mark.parametrize(
  ("body", "code", "message"),
  [
    ({"model": "three"}, 400, "input: Field required"),
    ({"model": "three", "input": []}, 400, "input: 0 texts"),
    ({"model": "three", "input": [3]}, 400, "input: "),
    ({"model": "tree", "input": "a"}, 404, "unknown model 'tree'"),
    ({"model": "three", "inputs": "a"}, 400, "did you mean 'input'"),
  ],
)
def test_a_wrong_request_is_one_message(client, body, code, message):
  answer = client.post("/v1/classify", json=body)
  assert answer.status_code == code
  assert message in answer.json()["error"]["message"]


def test_adapters_come_and_go(client):
  unload = client.post("/v1/unload_lora_adapter", json={"lora_name": "two"})
  assert unload.status_code == 200
  asked = {"model": "two", "input": "a"}
  assert client.post("/v1/classify", json=asked).status_code == 404
  for path, code in (("../minute", 400), ("broken", 400), ("two", 200)):
    body = {"lora_name": "two", "lora_path": path}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == code
  assert client.post("/v1/classify", json=asked).status_code == 200


def test_adapters_share_the_bases_arrays(root):
  served = _served(root)
  models = (served._served[name].classifier.model for name in ("three", "two"))
  one, other = (paths.flatten(model.params) for model in models)
  apart = {path for path in one if one[path] is not other[path]}
  assert apart == {"classifier/kernel", "classifier/bias"}


def test_an_adapter_adds_no_base_to_the_memory(root):
  served = _served(root)

  def held():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())

  before, base = held(), served._served["two"].classifier.model.params
  served.load("again", "two")
  assert held() - before < sum(x.nbytes for x in jax.tree.leaves(base)) / 4


def test_a_model_of_another_task_is_refused(tmp_path):
  peers.tiny("t5", tmp_path)
  with pytest.raises(LoraxError, match="a t5 is no language model, nor a classifier"):
    start.served(registry.load(tmp_path), "t5", None, language={})
