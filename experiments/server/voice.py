"""Tokens of texts and chats, for one name of the server."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.inference import prompts
from lorax_flax.data import chat
from lorax_flax.data.tokenize import check_characters, load_tokenizer
from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.errors import LoraxError
from lorax_flax.hub.checkpoints import beside


@dataclass(frozen=True)
class Voice:
  """A tokenizer, and the chat template of its folder."""

  tokenizer: Tokenizer
  folder: Path
  vocab_size: int
  chat_template: str | None = None

  def of(self, adapter: Path) -> "Voice":
    """The voice of an adapter of this base: its own, where it brings a tokenizer."""
    if not beside.has_tokenizer(adapter):
      return self
    own = load_tokenizer(self.folder, adapter)
    return replace(self, tokenizer=own, folder=adapter)

  def of_text(self, text: str) -> list[int]:
    """Token ids of a text to go on from."""
    check_characters(text)
    return list(self.tokenizer.encode(text, add_special_tokens=True).ids)

  def of_ids(self, ids: Sequence[int]) -> list[int]:
    """Token ids as they were given, checked."""
    if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
      raise LoraxError(f"the id {wrong[0]}: ids go from 0 to {self.vocab_size - 1}")
    return list(ids)

  def of_chat(
    self, messages: Sequence[Any], tools: Any = None, variables: Any = None
  ) -> list[int]:
    """Token ids of a chat, up to the answer that comes next."""
    asked = _chat(messages, tools, variables)
    template = chat.of_model(self.folder, self.chat_template)
    return prompts.of_chat(asked, self.tokenizer, template)

  def call_form(self, messages: Sequence[Any], tools: Any) -> str:
    """The chat template in which the calls of tools are described."""
    template = chat.of_model(self.folder, self.chat_template)
    return template.text(_chat(messages, tools))


def load(base: Path, vocab_size: int, chat_template: str | None) -> Voice:
  """The voice of a base.

  Raises:
    LoraxError: no tokenizer.
  """
  return Voice(load_tokenizer(base), base, vocab_size, chat_template)


def _chat(messages: Sequence[Any], tools: Any, variables: Any = None) -> chat.Chat:
  rendered = [_with_objects(message) for message in messages]
  return chat.check(
    {"messages": rendered, "tools": tools, "chat_template_kwargs": variables}
  )


def _with_objects(message: Any) -> Any:
  """The message with the arguments of its calls as objects, as templates read them.

  OpenAI's clients send these as JSON.
  """
  calls = message.get("tool_calls") if isinstance(message, Mapping) else None
  if not isinstance(calls, list):
    return message
  return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
  function = call.get("function") if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping):
    return call
  arguments = function.get("arguments")
  if not isinstance(arguments, str):
    return call
  try:
    parsed = json.loads(arguments)
  except ValueError as error:
    raise LoraxError(f"the arguments of a tool call are no JSON: {error}") from error
  return {**call, "function": {**function, "arguments": parsed}}
