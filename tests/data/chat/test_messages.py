"""Rows of data are checked, and made plain, before a template is given them."""

import numpy as np
import pytest

from lorax_flax.data import chat as chats
from lorax_flax.errors import LoraxError
from tests.data.chat.conftest import ONE, TOOLS, WEATHER, assistant, call, user

BAD = {
  "nothing": ([], "its list of messages is empty"),
  "no list": ({"messages": "Hello"}, "messages are a list of objects; found 'Hello'"),
  "no messages": ({"text": "Hello"}, r"a chat has messages; found \['text'\]"),
  "a string": (
    ["Hello"],
    "message 1 is an object with role and content; found 'Hello'",
  ),
  "no role": ([{"content": "a"}], "message 1 has the role None"),
  "a number's role": (
    [user("a"), {"role": 1, "content": "a"}],
    "message 2 has the role",
  ),
  "no content": ([*ONE, {"role": "user"}], r"message 3 \(user\) has no content"),
  "no content and no calls": (
    [user("a"), assistant(None, tool_calls=[])],
    r"message 2 \(assistant\) has no content, and only an assistant's with tool_calls",
  ),
  "calls of a user": (
    [user(None, tool_calls=[call("f", {})])],
    r"message 1 \(user\) has no content",
  ),
  "a number": ([user(3)], r"message 1 \(user\): content is a string, or a list of"),
  "an image": (
    [user([{"type": "image", "url": "a.png"}])],
    r"message 1 \(user\): content is a string.*found \[\{'type': 'image'",
  ),
  "a part without text": ([user([{"type": "text"}])], "content is a string, or a list"),
  "bytes": ([user("a", name=b"b")], "found bytes"),
  "tools of no form": ({"messages": ONE, "tools": "weather"}, "its tools are no JSON"),
  "tools of another form": (
    {"messages": ONE, "tools": {"name": "weather"}},
    "tools are a list of objects",
  ),
  "variables": (
    {"messages": ONE, "chat_template_kwargs": "no"},
    "chat_template_kwargs is an object; found 'no'",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_refused_by_name(case):
  row, message = BAD[case]
  with pytest.raises(LoraxError, match=message):
    chats.check(row)


def test_values_of_a_table_are_plain():
  table = [{"role": "user", "content": "a", "name": None, "n": np.int64(3)}]
  found = chats.check({"messages": np.asarray(table, object), "tools": None})
  assert found.messages == [{"role": "user", "content": "a", "n": 3}]
  assert type(found.messages[0]["n"]) is int


def test_tools_may_be_json():
  tools = '[{"type": "function", "function": {"name": "f"}}]'
  assert chats.check({"messages": TOOLS, "tools": tools}).tools == [
    {"type": "function", "function": {"name": "f"}}
  ]


def test_other_keys_go_to_the_template():
  row = {"messages": TOOLS, "tools": [WEATHER], "documents": [{"title": "t"}]}
  found = chats.check(row)
  assert found.messages[2] == TOOLS[2]
  assert "content" not in found.messages[1]
  assert found.tools == [WEATHER]
  assert found.documents == [{"title": "t"}]


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_thoughts_have_the_names_that_templates_read(name):
  [found] = chats.check([assistant("a", **{name: "Hm"})]).messages
  assert found["reasoning_content"] == found["thinking"] == "Hm"


def test_deep_nesting_is_an_error():
  deep: list = []
  for _ in range(100_000):
    deep = [deep]
  with pytest.raises(LoraxError, match="too many lists in one another"):
    chats.check([user("a", deep=deep)])
