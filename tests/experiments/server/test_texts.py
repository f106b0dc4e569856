"""Completions and chats over HTTP: the texts of `generate`, mixed or alone."""

import base64
import concurrent.futures
import json
import threading

import anyio
import httpx
import numpy as np
import peft
import pytest
import torch
import transformers
from starlette.testclient import TestClient

from experiments.server import app
from tests import compiles
from tests.experiments.server.conftest import language

NEW = 12
MESSAGES = [{"role": "user", "content": "three four"}]


def _complete(client, model, prompt, **fields):
  body = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
  answer = client.post("/v1/completions", json={**body, **fields})
  assert answer.status_code == 200, answer.text
  return answer.json()


def _events(answer):
  assert answer.headers["content-type"].startswith("text/event-stream")
  lines = [line for line in answer.text.split("\n\n") if line]
  assert lines.pop() == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_mixed_adapters_write_what_each_writes_alone(client, alone):
  names, prompts = ("tiny", "first", "second"), ("one", "five six", "nine, one two")
  asked = [(name, prompt) for prompt in prompts for name in names]
  with concurrent.futures.ThreadPoolExecutor(9) as pool:
    answers = list(pool.map(lambda each: _complete(client, *each), asked))
  texts = [answer["choices"][0]["text"] for answer in answers]
  assert texts == [alone(*each, NEW) for each in asked]
  assert len(set(texts)) == 9


def test_a_stream_and_several_choices_are_the_same_texts(client):
  fields = {"temperature": 0.9, "seed": 3, "n": 2, "stop": ["zz"], "top_p": 0.9}
  prompts = ["one", "two"]
  full = _complete(client, "first", prompts, **fields)
  assert [choice["index"] for choice in full["choices"]] == [0, 1, 2, 3]
  assert len({choice["text"] for choice in full["choices"]}) == 4
  body = {"model": "first", "prompt": prompts, "max_tokens": NEW, "stream": True}
  body["stream_options"] = {"include_usage": True}
  events = _events(client.post("/v1/completions", json={**body, **fields}))
  assert events.pop()["usage"] == full["usage"]
  texts = ["", "", "", ""]
  for event in events:
    (choice,) = event["choices"]
    texts[choice["index"]] += choice["text"]
  assert texts == [choice["text"] for choice in full["choices"]]


def test_a_chat_is_its_rendered_prompt(client, served, alone):
  body = {"model": "first", "messages": MESSAGES, "temperature": 0}
  answer = client.post("/v1/chat/completions", json={**body, "max_tokens": NEW}).json()
  message = answer["choices"][0]["message"]
  ids = served.voice("first").of_chat(MESSAGES)
  as_ids = _complete(client, "first", ids)
  assert message["content"] == as_ids["choices"][0]["text"]
  assert answer["usage"] == as_ids["usage"]
  assert answer["usage"]["prompt_tokens"] == len(ids)
  stream = {**body, "max_completion_tokens": NEW, "stream": True}
  events = _events(client.post("/v1/chat/completions", json=stream))
  deltas = [event["choices"][0]["delta"] for event in events]
  assert deltas[0] == {"role": "assistant", "content": ""}
  assert "".join(d.get("content", "") for d in deltas) == message["content"]
  assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_embeddings_are_the_last_features_of_each_text_alone(root, client):
  texts = ["one", "five six seven", "nine"]
  base = transformers.LlamaForCausalLM.from_pretrained(root / "tiny")
  tokenizer = transformers.AutoTokenizer.from_pretrained(root / "tiny")
  for name in ("tiny", "second"):
    model = base
    if name != "tiny":
      model = peft.PeftModel.from_pretrained(base, root / "adapters" / name)
    expected = []
    for text in texts:
      with torch.no_grad():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
      expected.append((hidden[0, -1] / hidden[0, -1].norm()).numpy())
    body = {"model": name, "input": texts}
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    found = [each["embedding"] for each in answer.json()["data"]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    packed = client.post(
      "/v1/embeddings", json={**body, "encoding_format": "base64"}
    ).json()
    vector = base64.b64decode(packed["data"][1]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(vector, "<f4"), np.float32(found[1]))


def test_tools_and_their_calls_reach_the_template(served, client):
  function = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
  tools = [{"type": "function", "function": function}]
  body = {"model": "tiny", "messages": MESSAGES, "tools": tools, "max_tokens": 2}
  tokens = lambda **own: client.post(
    "/v1/chat/completions", json={**body, **own}
  ).json()["usage"]["prompt_tokens"]
  voice = served.voice("tiny")
  assert tokens() == len(voice.of_chat(MESSAGES, tools))
  assert tokens() > tokens(tool_choice="none") == len(voice.of_chat(MESSAGES))
  call = {"type": "function", "function": {"name": "weather", "arguments": '{"a": 1'}}
  said = {"role": "assistant", "content": "", "tool_calls": [call]}
  broken = {**body, "messages": [*MESSAGES, said]}
  answer = client.post("/v1/chat/completions", json=broken)
  assert answer.status_code == 400
  assert "arguments of a tool call are no JSON" in answer.json()["error"]["message"]


def test_a_warm_server_compiles_nothing_for_a_short_text_or_one_that_goes_on(root):
  served = language(root, length=96)
  served.warm()
  client, before = TestClient(app.create(served)), served.engine.reused
  with compiles.counted() as found:
    for model in ("tiny", "first"):
      for tokens in (3, 18):
        _complete(client, model, [5] * tokens)
  served.close()
  assert served.engine.reused > before
  assert not found


def test_a_full_queue_is_429_and_a_closed_server_503(root):
  served, event = language(root, rows=1, waiting=1), threading.Event()
  client = TestClient(app.create(served))
  body = {"model": "tiny", "prompt": "one", "max_tokens": 2, "temperature": 0}
  served.engine.call(event.wait)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(client.post, "/v1/completions", json=body)
    while not served.engine.waiting:
      pass
    try:
      for prompt in ("two", ["two", "three"]):
        full = client.post("/v1/completions", json={**body, "prompt": prompt})
        assert full.status_code == 429, full.text
        assert full.json()["error"]["type"] == "rate_limit_error"
    finally:
      event.set()
    assert first.result().status_code == 200
  served.close()
  assert client.post("/v1/completions", json=body).status_code == 503


def test_a_client_that_leaves_frees_its_row(root):
  """A stream that is left after its first event, and an answer before its end."""
  served = language(root, length=4096)
  application = app.create(served)
  body = {"model": "tiny", "prompt": "one", "max_tokens": 4000, "temperature": 0}

  async def leave(stream):
    messages = [
      {
        "type": "http.request",
        "body": json.dumps({**body, "stream": stream}).encode(),
        "more_body": False,
      }
    ]
    sent, left = [], anyio.Event()

    async def receive():
      if messages:
        return messages.pop()
      if stream:
        await left.wait()
      return {"type": "http.disconnect"}

    async def send(message):
      sent.append(message)
      if len(sent) == 2:
        left.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": [], "query_string": b"", "asgi": {"spec_version": "2.3"}}
    await application(scope, receive, send)
    return sent

  taken, submit = [], served.submit

  def noted(*args):
    taken.append(submit(*args))
    return taken[-1]

  served.submit = noted

  async def both():
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
      for stream in (True, False):
        sent = await leave(stream)
        assert (len(sent) < 100) if stream else sent[0]["status"] == 499
        assert taken[-1].over
        short = {**body, "max_tokens": 1}
        answer = await client.post("/v1/completions", json=short, timeout=60)
        assert answer.status_code == 200

  # In one loop: one that is closed would end the texts by itself.
  anyio.run(both)
  served.close()
