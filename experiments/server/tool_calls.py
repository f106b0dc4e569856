"""Calls of tools in a model's text, by the form that its chat template asks for.

Hermes (Qwen, SmolLM3, …): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, after
text and several times. Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` and no
more; the mark is a special token, which no text shows. Llama 3: `{"name": …,
"parameters": {…}}` and no more. What is no call in the template's form stays text.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lorax_flax.files import strict_json
from lorax_flax.serve.text import StopStrings

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"


class Call(NamedTuple):
  """A call of a function.

  Attributes:
    name: of the function.
    arguments: JSON.
  """

  name: str
  arguments: str

  def of_openai(self) -> dict[str, Any]:
    """The call in a message."""
    function = {"name": self.name, "arguments": self.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function"} | {
      "function": function
    }


class Found(NamedTuple):
  """Text and calls that a piece of text brings."""

  text: str = ""
  calls: tuple[Call, ...] = ()


def joined(found: Sequence[Found]) -> Found:
  """One after another."""
  calls = tuple(call for each in found for call in each.calls)
  return Found("".join(each.text for each in found), calls)


class Plain:
  """Text without calls."""

  def push(self, piece: str) -> Found:
    """Text and calls that are certain after one more piece."""
    return Found(piece)

  def finish(self) -> Found:
    """The rest: no text comes any more."""
    return Found()


class Tagged(Plain):
  """Text with calls between tags, each given once it is complete."""

  def __init__(self) -> None:
    self._before, self._held = StopStrings([_OPEN]), ""

  def push(self, piece: str) -> Found:
    text = ""
    if not self._before.found:
      text, piece = self._before.push(piece), self._before.rest
    self._held += piece
    inside, closed, rest = self._held.partition(_CLOSE)
    if not closed:
      return Found(text)
    return joined([Found(text), self._ended(inside, closed), self.push(rest)])

  def finish(self) -> Found:
    if not self._before.found:
      return Found(self._before.finish())
    return self._ended(self._held, "")

  def _ended(self, inside: str, closed: str) -> Found:
    """The call that has been written; text follows."""
    self._before, self._held = StopStrings([_OPEN]), ""
    calls = _calls(inside, "arguments")
    return Found("", calls) if calls else Found(f"{_OPEN}{inside}{closed}")


class Leading(Plain):
  """Text that is calls alone, or text alone: its first characters tell."""

  def __init__(self, starts: Sequence[str], arguments: str):
    """Takes what calls start with, and the name of their arguments."""
    self._starts, self._arguments = starts, arguments
    self._held, self._is_text = "", False

  def push(self, piece: str) -> Found:
    if self._is_text:
      return Found(piece)
    self._held += piece
    start = self._held.lstrip()
    if any(start.startswith(s) or s.startswith(start) for s in self._starts):
      return Found()
    self._is_text = True
    return Found(self._held)

  def finish(self) -> Found:
    if self._is_text:
      return Found()
    calls = _calls(self._held.strip().removeprefix(_MISTRAL), self._arguments)
    return Found("", calls) if calls else Found(self._held)


# By what the chat template holds.
_READERS: dict[str, Callable[[], Plain]] = {
  _OPEN: Tagged,
  _MISTRAL: lambda: Leading([_MISTRAL, "[{"], "arguments"),
  '"parameters":': lambda: Leading(['{"name"', '{ "name"'], "parameters"),
}


def reader(template: str) -> Plain:
  """Reader of the calls in one text of a model with this chat template."""
  return next((make() for mark, make in _READERS.items() if mark in template), Plain())


def _calls(text: str, arguments: str) -> tuple[Call, ...]:
  """The calls that a text of JSON holds; none where it is anything else."""
  try:
    found = strict_json.parse(text)
  except ValueError:
    return ()
  objects = found if isinstance(found, list) else [found]
  calls = []
  for each in objects:
    given = each.get(arguments, {}) if isinstance(each, dict) else None
    if not isinstance(given, dict) or not isinstance(each.get("name"), str):
      return ()
    calls.append(Call(each["name"], json.dumps(given, ensure_ascii=False)))
  return tuple(calls)
