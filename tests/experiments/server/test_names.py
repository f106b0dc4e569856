"""Adapters that come and go over HTTP, and those that can't."""

import collections
import concurrent.futures
import json
import shutil
import threading

import pytest
import transformers
from jax import monitoring
from starlette.testclient import TestClient

from experiments.server import app, start, voice
from lorax_flax.data import tokenize
from lorax_flax.hub.adapters import any as readers
from lorax_flax.models import registry
from tests.experiments import peers
from tests.experiments.server.conftest import SETTINGS, language


def _load(client, name, path=None):
  fields = {"lora_name": name} | ({} if path is None else {"lora_path": str(path)})
  return client.post("/v1/load_lora_adapter", json=fields)


def _text(client, model, new=8):
  body = {"model": model, "prompt": "one", "max_tokens": new, "temperature": 0}
  answer = client.post("/v1/completions", json=body)
  return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer


def _models(client):
  return [model["id"] for model in client.get("/v1/models").json()["data"]]


def test_the_models_are_the_base_and_its_adapters(client):
  found = client.get("/v1/models").json()["data"]
  assert [(m["id"], m["parent"]) for m in found] == [
    ("tiny", None),
    ("first", "tiny"),
    ("second", "tiny"),
  ]


def test_an_adapter_comes_and_goes_and_nothing_is_compiled(client):
  texts = {name: _text(client, name) for name in ("tiny", "first", "second")}
  assert len({*texts.values()}) == 3
  # This module's caches were emptied after the server's start.
  assert _load(client, "another", "first").is_success
  client.post("/v1/unload_lora_adapter", json={"lora_name": "another"})
  _text(client, "tiny")
  compiled = []
  listener = lambda name, *_, **__: compiled.append(name)
  monitoring.register_event_duration_secs_listener(listener)
  try:
    loaded = _load(client, "another", "first")
    assert loaded.status_code == 200, loaded.text
    assert loaded.text == "Success: LoRA adapter 'another' added successfully."
    assert _text(client, "another") == texts["first"]
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "first"})
    assert gone.status_code == 200, gone.text
    assert _text(client, "first").status_code == 404
    assert _load(client, "first").status_code == 200
    assert client.post(
      "/v1/unload_lora_adapter", json={"lora_name": "another"}
    ).is_success
    assert {name: _text(client, name) for name in texts} == texts
  finally:
    monitoring.unregister_event_duration_listener(listener)
  assert not [name for name in compiled if "backend_compile" in name]


def test_a_server_may_start_without_an_adapter(root, tmp_path, client):
  loaded = registry.load(root / "tiny")
  served = start.served(loaded, "tiny", tmp_path, language=SETTINGS)
  empty = TestClient(app.create(served))
  assert _models(empty) == ["tiny"]
  shutil.copytree(root / "adapters/first", tmp_path / "late")
  assert _load(empty, "late").status_code == 200
  assert _text(empty, "late") == _text(client, "first")
  assert _text(empty, "tiny") == _text(client, "tiny")
  served.close()
  alone = start.served(loaded, "tiny", None, language=SETTINGS)
  refused = _load(TestClient(app.create(alone)), "late")
  assert refused.status_code == 400
  assert "no folder of adapters" in refused.json()["error"]["message"]
  alone.close()


def test_more_adapters_than_slots_take_turns(root):
  served = language(root, rows=1, capacity=1)
  client = TestClient(app.create(served))
  first, second = _text(client, "first"), _text(client, "second")
  assert first != second
  body = {"prompt": "one", "max_tokens": 8, "temperature": 0}
  asked = [{**body, "model": name} for name in ("first", "second", "tiny") * 3]
  with concurrent.futures.ThreadPoolExecutor(9) as pool:
    post = lambda each: client.post("/v1/completions", json=each).json()
    texts = [x["choices"][0]["text"] for x in pool.map(post, asked)]
  assert texts == [first, second, _text(client, "tiny")] * 3
  served.close()


def test_an_adapter_in_use_is_replaced_once_its_texts_are_written(root):
  served = language(root, rows=2)
  client = TestClient(app.create(served))
  before, expected = _text(client, "first"), _text(client, "first", 60)
  event, found = threading.Event(), []
  served.engine.call(event.wait)
  writing = threading.Thread(target=lambda: found.append(_text(client, "first", 60)))
  writing.start()
  while not served.engine.waiting:
    pass
  replacing = threading.Thread(target=_load, args=(client, "first", "second"))
  replacing.start()
  event.set()
  replacing.join()
  writing.join()
  assert found == [expected]
  assert _text(client, "first") == _text(client, "second") != before
  served.close()


@pytest.mark.parametrize(
  "path",
  [
    "../tiny",
    "..",
    ".",
    "/etc",
    "first/../../tiny",
    "first/..",
    "//",
    "first\0",
    "~/first",
    ".hidden",
    "frist",
    "a" * 5000,
  ],
)
def test_a_path_that_leaves_the_folder_is_refused(client, root, path):
  (root / "adapters/.hidden").mkdir(exist_ok=True)
  answer = _load(client, "other", path)
  assert answer.status_code == 400
  message = answer.json()["error"]["message"]
  assert "is no folder in the folder" in message or "unknown adapter" in message
  assert "other" not in _models(client)


def test_a_path_in_the_folder_is_its_name(client, root):
  assert _load(client, "other", root / "adapters" / "first").status_code == 200
  assert client.post("/v1/unload_lora_adapter", json={"lora_name": "other"}).is_success


def test_an_adapter_that_does_not_fit_is_named_and_the_others_go_on(client, root):
  before = _text(client, "first")
  folder = root / "adapters"
  shutil.copytree(folder / "first", folder / "truncated", dirs_exist_ok=True)
  file = folder / "truncated/adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  config = transformers.LlamaConfig.from_pretrained(root / "tiny", hidden_size=32)
  wide = transformers.LlamaForCausalLM(config)
  peers.adapt(wide, folder / "wide", modules_to_save=None, target_modules=["q_proj"])
  base = transformers.LlamaForCausalLM.from_pretrained(root / "tiny")
  high = {"modules_to_save": None, "target_modules": ["q_proj"], "r": 12}
  peers.adapt(base, folder / "high", **high)
  base = transformers.LlamaForCausalLM.from_pretrained(root / "tiny")
  gated = {"modules_to_save": None, "target_modules": ["gate_proj"]}
  peers.adapt(base, folder / "gated", **gated)
  for name, message in (
    ("truncated", "truncated"),
    ("wide", "q_proj"),
    ("high", "rank"),
    ("gated", "gate_proj"),
  ):
    answer = _load(client, name)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert _text(client, "first") == before
    shutil.rmtree(folder / name)
  assert {*_models(client)} == {"tiny", "first", "second"}


def test_what_can_not_be_named_is_refused(client):
  unload = lambda name: client.post("/v1/unload_lora_adapter", json={"lora_name": name})
  assert unload("tiny").status_code == 400
  assert "did you mean 'first'" in json.dumps(unload("frist").json())
  for name in ("tiny", "", "a\n", "a b", "é", "x" * 300):
    assert _load(client, name, "first").status_code == 400


def test_a_start_reads_each_folder_once_and_a_tokenizer_where_there_is_one(
  root, tmp_path, monkeypatch, caplog
):
  for name in ("first", "second"):
    shutil.copytree(root / "adapters" / name, tmp_path / name)
  for name in ("spoken", "tiny", "truncated"):
    shutil.copytree(tmp_path / "first", tmp_path / name)
  shutil.copy(root / "tiny/tokenizer.json", tmp_path / "spoken")
  file = tmp_path / "truncated/adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  base = transformers.LlamaForCausalLM.from_pretrained(root / "tiny")
  high = {"modules_to_save": None, "target_modules": ["q_proj"], "r": 12}
  peers.adapt(base, tmp_path / "high", **high)
  count, tokenizers = collections.Counter(), []

  def read(folder, *args, read=readers.read, **kwargs):
    count[folder.name] += 1
    return read(folder, *args, **kwargs)

  def load_tokenizer(base, adapter=None):
    tokenizers.append(adapter)
    return tokenize.load_tokenizer(base, adapter)

  monkeypatch.setattr(readers, "read", read)
  monkeypatch.setattr(voice, "load_tokenizer", load_tokenizer)
  loaded = registry.load(root / "tiny")
  made = start.served(loaded, "tiny", tmp_path, language=SETTINGS)
  made.close()
  assert made.models == ["tiny", "first", "second", "spoken"]
  assert count == dict.fromkeys(("first", "high", "second", "spoken", "tiny"), 1)
  assert tokenizers == [None, tmp_path / "spoken"]
  assert made.voice("spoken").folder == tmp_path / "spoken"
  assert made.voice("first") is made.voice("tiny")
  left = [each for each in caplog.messages if "is left out" in each]
  assert [each.split()[2] for each in left] == ["truncated", "high", "tiny"]
  for line, reason in zip(
    left, ("cut off", "rank 12", "name of the base"), strict=True
  ):
    assert reason in line
