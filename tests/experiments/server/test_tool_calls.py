"""Calls of tools in texts of the usual forms, and in answers to an openai client."""

import dataclasses
import json
import types

import openai
import pytest
from starlette.testclient import TestClient

from experiments.server import app, tool_calls
from lorax_flax.serve.request import Piece
from tests.experiments import own_text

TOOLS = [
  {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
  for name in ("weather", "time")
]
MESSAGES = [{"role": "user", "content": "three four"}]
HERMES, MISTRAL, LLAMA = (
  'For each call return <tool_call>{"name": …}</tool_call>',
  "[TOOL_CALLS]",
  'Respond in the format {"name": function name, "parameters": dictionary}',
)
PARIS = tool_calls.Call("weather", '{"city": "Paris «1»"}')
NOW = tool_calls.Call("time", "{}")
TEXTS = [
  (
    HERMES,
    'Yes <b>. <tool_call>\n{"name": "weather", "arguments": {"city": "Paris «1»"}}\n'
    '</tool_call>\n<tool_call>{"name": "time", "arguments": {}}</tool_call>',
    ("Yes <b>. \n", (PARIS, NOW)),
  ),
  (HERMES, '<tool_call>{"name": "time"}', ("", (NOW,))),
  (HERMES, "a <tool_call>{broken</tool_call> b <tool", None),
  (HERMES, '<tool_call>{"name": "time", "arguments": 1}</tool_call>', None),
  (
    MISTRAL,
    '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris «1»"}},'
    ' {"name": "time", "arguments": {}}]',
    ("", (PARIS, NOW)),
  ),
  (MISTRAL, ' [{"name": "time", "arguments": {}}]', ("", (NOW,))),
  (MISTRAL, "[1] says that", None),
  (MISTRAL, '[{"name": 3}]', None),
  (
    LLAMA,
    '{"name": "weather", "parameters": {"city": "Paris «1»"}}',
    ("", (PARIS,)),
  ),
  (LLAMA, '{"names": ["weather"]}', None),
  (LLAMA, "It is " + '{"name": "time", "parameters": {}}', None),
  ("{{ messages }}", '<tool_call>{"name": "time"}</tool_call>', None),
]


@pytest.mark.parametrize(("template", "text", "expected"), TEXTS)
def test_calls_are_found_however_the_text_is_cut(template, text, expected):
  for size in (1, 2, 3, 7, 1000):
    reader = tool_calls.reader(template)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = [*map(reader.push, pieces), reader.finish()]
    assert tool_calls.joined(found) == (expected or (text, ()))


def test_text_is_not_held_back_longer_than_it_may_be_a_call():
  for template in (HERMES, MISTRAL, LLAMA):
    reader = tool_calls.reader(template)
    assert reader.push("a < b") == ("a < b", ())


@pytest.fixture
def scripted(served, tmp_path, monkeypatch):
  """An openai client, and the text that the model writes to it next."""
  file = tmp_path / "own.jinja"
  file.write_text("{# " + HERMES + " #}" + own_text.UNMARKED)
  voice = dataclasses.replace(served.voice("tiny"), chat_template=str(file))
  monkeypatch.setitem(served._voices, "tiny", voice)
  script = types.SimpleNamespace(text="", finish="stop")

  def submit(model, prompt, decoding, number, listener):
    pieces = [script.text[i : i + 5] for i in range(0, len(script.text), 5)]
    for i, piece in enumerate(pieces):
      is_last = i == len(pieces) - 1
      listener(Piece(i, piece, script.finish if is_last else None))
    return types.SimpleNamespace(cancel=lambda: None)

  monkeypatch.setattr(served, "submit", submit)
  client = TestClient(app.create(served))
  return openai.OpenAI(
    base_url="http://testserver/v1", api_key="none", http_client=client
  ), script


def test_an_openai_client_reads_the_calls(scripted):
  client, script = scripted
  ask = client.chat.completions.create
  asked = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS}
  script.text = TEXTS[0][1]
  (choice,) = ask(**asked).choices
  assert choice.finish_reason == "tool_calls"
  assert choice.message.content == "Yes <b>. \n"
  calls = choice.message.tool_calls
  read = lambda f: (f.name, json.loads(f.arguments))
  expected = [("weather", {"city": "Paris «1»"}), ("time", {})]
  assert [read(call.function) for call in calls] == expected
  assert len({call.id for call in calls}) == 2
  # What was called and answered goes back.
  answered = [
    *MESSAGES,
    choice.message.model_dump(exclude_none=True),
    *({"role": "tool", "tool_call_id": c.id, "content": "sun"} for c in calls),
  ]
  assert ask(**{**asked, "messages": answered}).choices[0].message.tool_calls

  with client.chat.completions.stream(**asked) as stream:
    last = stream.get_final_completion().choices[0]
  assert last.finish_reason == "tool_calls"
  assert last.message.content == choice.message.content
  assert [read(c.function) for c in last.message.tool_calls] == expected

  script.finish = "length"
  assert ask(**asked).choices[0].finish_reason == "length"
  script.finish = "stop"
  # Without tools, or where none may be called, the text is the text.
  for own in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}):
    (choice,) = ask(**{**asked, **own}).choices
    assert choice.message.content == script.text
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
  script.text = '<tool_call>{"name": "time"}</tool_call>'
  assert ask(**asked).choices[0].message.content is None
