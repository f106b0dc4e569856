"""Requests that can't be used: each is refused with one message, and harms no other."""

import json
import random

import pytest
from starlette.testclient import TestClient

from experiments.server import app, schemas

VALID = {
  "/v1/completions": (
    schemas.Completion,
    {"model": "tiny", "prompt": "one", "max_tokens": 2, "temperature": 0},
  ),
  "/v1/chat/completions": (
    schemas.Chat,
    {
      "model": "tiny",
      "messages": [{"role": "user", "content": "one"}],
      "max_tokens": 2,
      "temperature": 0,
    },
  ),
  "/v1/load_lora_adapter": (schemas.LoadAdapter, {"lora_name": "x"}),
  "/v1/unload_lora_adapter": (schemas.UnloadAdapter, {"lora_name": "x"}),
}
# Values of every type, none of which any field takes, but for those of its own type.
JUNK = {
  "string": ["", "\ud800", "x" * 100_000],
  "integer": [-1, 10**30, 2**63],
  "number": [-0.5, 1e300],
  "boolean": [True],
  "array": [[], [[]], [None], [{}], [1, "a"]],
  "object": [{}, {"a": {"b": 1}}],
}


def _types(schema, field):
  found = schema["properties"][field]
  return {each.get("type", "object") for each in found.get("anyOf", [found])}


def _malformed(count):
  """(path, text of a body) of requests that no schema takes."""
  rng = random.Random(0)
  for _ in range(count):
    path = rng.choice(list(VALID))
    model, valid = VALID[path]
    schema, body = model.model_json_schema(), dict(valid)
    kind = rng.choice(("missing", "unknown", "type", "type", "type", "text", "nested"))
    if kind == "missing":
      del body[rng.choice(schema["required"])]
    elif kind == "unknown":
      body[rng.choice(("promt", "", "__class__", "model ", "é"))] = rng.choice((1, "a"))
    elif kind == "type":
      field = rng.choice(list(schema["properties"]))
      own = _types(schema, field) | {"object", "boolean"}
      own |= {"integer"} if "number" in own else set()
      other = rng.choice([name for name in JUNK if name not in own])
      body[field] = rng.choice(JUNK[other])
    elif kind == "nested":
      deep = "[" * 5000 + "]" * 5000
      text = json.dumps(body)[:-1] + f', "stop": {deep}}}'
      yield path, text.encode()
      continue
    text = json.dumps(body).encode()
    if kind == "text":
      cut = rng.randrange(1, len(text))
      text = rng.choice(
        (text[:cut], text[cut:], b"\xff" + text, b"[" + text + b"]", b"", b"NaN")
      )
    yield path, text


def test_ten_thousand_malformed_requests_are_refused_and_nothing_else(client):
  found = {}
  for path, text in _malformed(10_000):
    answer = client.post(path, content=text)
    assert answer.status_code in (400, 404), (path, text[:200], answer.text)
    message = answer.json()["error"]["message"]
    assert 0 < len(message) < 5000
    found[message.split(":")[0]] = text
  assert len(found) > 10
  body = VALID["/v1/completions"][1]
  assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"max_token": 3}, "unknown field 'max_token'; did you mean 'max_tokens'"),
    ({"logprobs": 3}, "the field 'logprobs' is not supported here"),
    ({"temperature": "1"}, "temperature: Input should be a valid number; found '1'"),
    ({"temperature": 0.001}, "temperature: 0.001 is neither 0"),
    ({"n": 17}, "n: Input should be less than or equal to 16"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": [1, 9999]}, "the id 9999: ids go from 0 to"),
    ({"prompt": "one " * 200}, "tokens, and up to 2 come after it: there is room"),
    ({"stop": ["a", ""]}, "stop: up to 16 texts, none of them empty"),
    ({"stop": "<|end|>."}, "holds the special token '<|end|>'"),
    ({"stream_options": {"include_usage": True}}, "the request asks for no stream"),
    ({"model": "\ud800"}, "unknown model"),
    ({"prompt": "\ud800"}, "half of a surrogate pair"),
  ],
)
def test_a_message_names_the_field(client, fields, message):
  text = json.dumps({**VALID["/v1/completions"][1], **fields})
  answer = client.post("/v1/completions", content=text)
  assert answer.status_code == (404 if "model" in fields else 400)
  assert message in answer.json()["error"]["message"]


def test_what_asks_for_nothing_is_taken(client):
  neutral = {
    "logprobs": None,
    "presence_penalty": 0,
    "top_p": 0.5,
    "seed": 3,
    "user": "a",
  }
  body = {**VALID["/v1/completions"][1], **neutral}
  assert client.post("/v1/completions", json=body).status_code == 200


def test_a_wrong_model_path_or_method_is_a_message(client):
  body = {**VALID["/v1/completions"][1], "model": "frist"}
  unknown = client.post("/v1/completions", json=body)
  assert unknown.status_code == 404
  assert "did you mean 'first'" in unknown.json()["error"]["message"]
  assert client.get("/v1/nothing").json()["error"]["code"] == 404
  assert client.get("/v1/completions").json()["error"]["code"] == 405
  large = client.post("/v1/completions", content=b" " * (9 << 20))
  assert large.status_code == 413


def test_a_key_opens_all_but_health(served):
  client = TestClient(app.create(served, ["secret", "other"]))
  assert client.get("/health").status_code == 200
  for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
    assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.get("/metrics", headers=headers).status_code == 401
  for key in ("secret", "other"):
    headers = {"Authorization": f"Bearer {key}"}
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_the_meters_count_requests_tokens_and_times(served):
  client = TestClient(app.create(served))
  client.post("/v1/completions", json=VALID["/v1/completions"][1])
  client.post("/v1/completions", content=b"{")
  client.get("/nowhere")
  lines = client.get("/metrics").text.splitlines()
  for line in (
    'lorax_requests_total{path="/v1/completions",status="200"} 1.0',
    'lorax_requests_total{path="/v1/completions",status="400"} 1.0',
    'lorax_requests_total{path="other",status="404"} 1.0',
    'lorax_generated_tokens_total{model="tiny"} 2.0',
    "lorax_time_to_first_token_seconds_count 1.0",
    "lorax_time_between_tokens_seconds_count 1.0",
    "lorax_running 0.0",
  ):
    assert line in lines
