"""A model's chat template: chats to text, as transformers' apply_chat_template."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lorax_flax.data.chat import jinja
from lorax_flax.data.chat.jinja import Span
from lorax_flax.data.chat.messages import Chat, Message, named
from lorax_flax.errors import LoraxError, listing, unknown

DEFAULT, TOOL_USE = "default", "tool_use"
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_OWN = ("messages", "tools", "documents", "add_generation_prompt")
_PROBE = "PROBE"
_Rendered = TypeVar("_Rendered")


@dataclass(frozen=True)
class ChatTemplate:
  """Chat template of a model.

  Attributes:
    texts: jinja by name; most models have "default" alone.
    special_tokens: variables bos_token, eos_token, ….
    origin: its file, for errors.
    name: of the text to use; None: "tool_use" for a chat with tools, where there is
      one, else "default".
  """

  texts: Mapping[str, str]
  special_tokens: Mapping[str, str]
  origin: str
  name: str | None = None

  def text(self, chat: Chat) -> str:
    """The jinja that renders this chat."""
    name = self.name
    if name is None:
      uses_tools = chat.tools is not None and TOOL_USE in self.texts
      name = TOOL_USE if uses_tools else DEFAULT
    if name in self.texts:
      return self.texts[name]
    if self.name is None:
      raise LoraxError(
        f"{self.origin} has several chat templates and no default: name one of"
        f" {listing(self.texts)}"
      )
    raise LoraxError(f"{self.origin}: {unknown('chat template', name, self.texts)}")


def render(
  template: ChatTemplate,
  chat: Chat,
  *,
  add_generation_prompt: bool = False,
  continue_final_message: bool = False,
) -> str:
  """Renders a chat.

  Args:
    template: of the model.
    chat: checked messages.
    add_generation_prompt: ends with the header of an assistant's message, for the model
      to go on from.
    continue_final_message: ends within the last message, for the model to continue.

  Raises:
    LoraxError: both of the flags, a final message without text, one that the template
      does not print; or the template can't render it, with the number and role of the
      message that it fails at.
  """
  if not continue_final_message:
    return _render(template, chat, jinja.render, add_generation_prompt)
  if add_generation_prompt:
    raise LoraxError(
      "continue_final_message and add_generation_prompt: a prompt ends within a message"
      " or with the header of a new one, not both"
    )
  return _unfinished(template, chat)


def render_marked(template: ChatTemplate, chat: Chat) -> tuple[str, list[Span]]:
  """The chat's text, and spans of characters that the template marks as generation."""
  return _render(template, chat, jinja.render_marked)


def _render(
  template: ChatTemplate,
  chat: Chat,
  renderer: Callable[[str, Mapping[str, Any]], _Rendered],
  add_generation_prompt: bool = False,
) -> _Rendered:
  text = template.text(chat)
  if own := sorted(set(chat.variables) & set(_OWN)):
    raise LoraxError(f"{listing(own)} can't be given as further variables")
  values = {
    **template.special_tokens,
    **chat.variables,
    "tools": chat.tools,
    "documents": chat.documents,
    "add_generation_prompt": add_generation_prompt,
  }
  messages = _fitted(text, chat.messages)
  try:
    return renderer(text, {**values, "messages": messages})
  except LoraxError as error:
    # The message after the longest beginning that the template renders.
    for count in range(len(messages) - 1, 0, -1):
      try:
        renderer(text, {**values, "messages": messages[:count]})
      except LoraxError:
        continue
      raise LoraxError(f"{named(chat, count)}: {error}") from error
    raise LoraxError(
      f"{named(chat, 0)}: {error}" if messages else str(error)
    ) from error


def _unfinished(template: ChatTemplate, chat: Chat) -> str:
  *before, last = chat.messages
  content = last.get("content")
  if not content:
    raise LoraxError(f"{named(chat, len(before))} has no content to continue")
  # A word at the end of the message shows where the message ends in the text.
  if isinstance(content, str):
    final = content
    tagged: Any = content + _CONTINUE
  else:
    final = content[-1]["text"]
    tagged = [*content[:-1], {**content[-1], "text": final + _CONTINUE}]
  chat = replace(chat, messages=[*before, {**last, "content": tagged}])
  text = render(template, chat)
  place = text.rfind(_CONTINUE.strip())
  if place < 0 or final.strip() not in text:
    raise LoraxError(
      f"{named(chat, len(before))} can't be continued: the chat template changes its"
      f" content, {final!r:.200}"
    )
  if text.startswith(_CONTINUE, place):
    return text[:place]
  return text[:place].rstrip()  # The template trims the message.


def _fitted(text: str, messages: list[Message]) -> list[Message]:
  """Messages with contents of the form that the template prints.

  Most templates print strings, and would print a list as Python writes it; a few loop
  over parts, and would leave out a string.
  """
  takes_strings, takes_parts = _forms(text)
  if not takes_parts and any(isinstance(m.get("content"), list) for m in messages):
    return [_with_string(message) for message in messages]
  if takes_parts and not takes_strings:
    return [_with_parts(message) for message in messages]
  return messages


def _with_string(message: Message) -> Message:
  content = message.get("content")
  if not isinstance(content, list):
    return message
  return {**message, "content": "".join(part["text"] for part in content)}


def _with_parts(message: Message) -> Message:
  content = message.get("content")
  if not isinstance(content, str):
    return message
  return {**message, "content": [{"type": "text", "text": content}]}


@functools.lru_cache
def _forms(text: str) -> tuple[bool, bool]:
  """Forms of content that a template prints: strings, and lists of parts."""

  def prints(content: Any) -> bool:
    values = {name: "" for name in jinja.variables(text) if name.endswith("_token")}
    message = {"role": "user", "content": content}
    try:
      rendered = jinja.render(text, {**values, "messages": [message]})
    except LoraxError:
      return False
    return _PROBE in rendered and "'text'" not in rendered and '"text"' not in rendered

  return prints(_PROBE), prints([{"type": "text", "text": _PROBE}])
