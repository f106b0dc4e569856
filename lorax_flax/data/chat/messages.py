"""Chats: messages of a row of data, checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.files import strict_json

ASSISTANT = "assistant"
Message = dict[str, Any]
# A message's thoughts go by one of these names; templates read the first, gpt-oss's the
# second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Chat:
  """A chat, as a template is given it.

  Attributes:
    messages: at least one, each with a role.
    tools: JSON schemas of functions that the model may call.
    documents: texts that the model may quote, each with title and text.
    variables: further variables of the template, such as enable_thinking.
  """

  messages: list[Message]
  tools: list[Any] | None = None
  documents: list[Any] | None = None
  variables: Mapping[str, Any] = field(default_factory=dict)


def check(row: Sequence[Any] | Mapping[str, Any]) -> Chat:
  """Makes a chat of a row of data.

  Args:
    row: a list of messages; or a row with `messages` and, optionally, `tools` and
      `documents` (lists, or JSON of these) and `chat_template_kwargs`. A message has a
      `role` and a `content`: a string, or a list of {"type": "text", "text": …};
      an assistant's with `tool_calls` needs none. Other keys go to the template, those
      without a value do not.

  Raises:
    LoraxError: a row or a message of another form, named by its number.
  """
  fields: Mapping[str, Any] = row if isinstance(row, Mapping) else {"messages": row}
  if "messages" not in fields:
    raise LoraxError(f"a chat has messages; found {sorted(fields)!r:.200}")
  messages = fields["messages"]
  if not isinstance(messages, list | tuple | np.ndarray):
    raise LoraxError(f"messages are a list of objects; found {messages!r:.200}")
  if not len(messages):
    raise LoraxError("its list of messages is empty")
  variables = fields.get("chat_template_kwargs")
  if not isinstance(variables, Mapping | None):
    raise LoraxError(f"chat_template_kwargs is an object; found {variables!r:.200}")
  try:
    return Chat(
      [_message(number, message) for number, message in enumerate(messages, 1)],
      tools=_objects("tools", fields.get("tools")),
      documents=_objects("documents", fields.get("documents")),
      variables=_plain(variables or {}),
    )
  except RecursionError as error:
    raise LoraxError("it has too many lists in one another") from error


def assistant_turns(chat: Chat) -> list[int]:
  """Positions of the messages that the model is to produce."""
  return [i for i, m in enumerate(chat.messages) if m["role"] == ASSISTANT]


def split(chat: Chat) -> Iterator[Chat]:
  """Yields one chat for each assistant turn, which is its last message.

  A template that renders a turn differently once others follow (Qwen3's removes earlier
  thoughts) shows the model each turn as it is to produce it in this form alone.
  """
  for i in assistant_turns(chat):
    yield replace(chat, messages=chat.messages[: i + 1])


def named(chat: Chat, index: int) -> str:
  """A message's number and role, for errors: "message 3 (user)"."""
  return f"message {index + 1} ({chat.messages[index]['role']})"


def _message(number: int, message: Any) -> Message:
  if not isinstance(message, Mapping):
    raise LoraxError(
      f"message {number} is an object with role and content; found {message!r:.200}"
    )
  # Tables have all keys in all rows, and templates test for a key's presence.
  found = {key: _plain(value) for key, value in message.items() if value is not None}
  role = found.get("role")
  if not isinstance(role, str) or not role:
    raise LoraxError(
      f"message {number} has the role {role!r}, and not a name as user, assistant,"
      f" system or tool: {found!r:.200}"
    )
  content = found.get("content")
  if content is None:
    if role != ASSISTANT or not found.get("tool_calls"):
      raise LoraxError(
        f"message {number} ({role}) has no content, and only an assistant's with"
        f" tool_calls needs none. Its keys: {', '.join(map(str, message))}"
      )
  elif not isinstance(content, str) and not _is_parts(content):
    raise LoraxError(
      f"message {number} ({role}): content is a string, or a list of"
      f' {{"type": "text", "text": …}}; found {content!r:.200}'
    )
  reasoning = next((found[name] for name in _REASONING if name in found), None)
  if reasoning is None:
    return found
  return {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _is_parts(content: Any) -> bool:
  return isinstance(content, list) and all(
    isinstance(part, dict)
    and part.get("type") == "text"
    and isinstance(part.get("text"), str)
    for part in content
  )


def _objects(name: str, value: Any) -> list[Any] | None:
  """A list of objects; JSON of it, since a table's column can't mix schemas."""
  if value is None:
    return None
  if isinstance(value, str):
    try:
      value = strict_json.parse(value)
    except ValueError as error:
      raise LoraxError(f"its {name} are no JSON: {error}") from error
  found = _plain(value)
  if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
    raise LoraxError(f"{name} are a list of objects; found {value!r:.200}")
  return found


def _plain(value: Any) -> Any:
  """A value of JSON's types alone: a template is not to reach other objects."""
  if value is None or type(value) in (str, int, float, bool):
    return value
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):  # of a table's cell
    return _plain(value.tolist())
  raise LoraxError(
    f"a chat holds strings, numbers, lists and objects; found {type(value).__name__}:"
    f" {value!r:.200}"
  )
