"""The parts of a chat that the model is to produce, as spans of characters."""

import functools
import re
from dataclasses import dataclass, replace
from typing import Literal

import tokenizers

from lorax_flax.data.chat import jinja
from lorax_flax.data.chat.jinja import Span
from lorax_flax.data.chat.messages import Chat, assistant_turns, named
from lorax_flax.data.chat.templates import ChatTemplate, render, render_marked
from lorax_flax.errors import LoraxError

Learn = Literal["all", "last"]
_OWN_TEMPLATE = (
  "give a template of your own (a .jinja file), with {% generation %}…"
  "{% endgeneration %} around what the model is to produce"
)
_LAST_ALONE = (
  'learn the last turn of each chat alone (learn="last", of a chat split at its turns)'
)
_SHOWN = 40  # characters of a text in an error


@dataclass(frozen=True)
class Markers:
  """Tokens that a tokenizer finds in a text before it splits it.

  Attributes:
    tokens: all but those of spaces alone; one at the end of a turn ends it.
    greedy: those that take the spaces behind them.
  """

  tokens: tuple[str, ...]
  greedy: tuple[str, ...]


@dataclass(frozen=True)
class Marked:
  """A chat's text, and the spans of it that are learnt, ordered."""

  text: str
  spans: list[Span]


def markers(tokenizer: tokenizers.Tokenizer, template: ChatTemplate) -> Markers:
  """The markers of a tokenizer, and the special tokens of a template."""
  added = tokenizer.get_added_tokens_decoder().values()
  names = {token.content for token in added} | set(template.special_tokens.values())
  return Markers(
    tokens=tuple(sorted(name for name in names if name.strip())),
    greedy=tuple(token.content for token in added if token.rstrip),
  )


def mark(
  template: ChatTemplate, chat: Chat, markers: Markers, *, learn: Learn = "all"
) -> Marked:
  """Renders a chat, and finds what the model is to produce in it.

  A template with `{% generation %}` says so itself. With another, a turn is the text
  between the chat up to it, rendered with a generation prompt (what the model is given
  when it is to produce the turn), and the chat up to and including it. Both have to be
  beginnings of the chat's text; where they are not, the text does not show the model
  what it will see, and the chat is refused.

  Args:
    template: of the model.
    chat: checked messages.
    markers: of the tokenizer. The last one of a turn ends it, and white space that the
      template puts behind it isn't learnt.
    learn: "all" assistant turns, or only the "last" one.

  Raises:
    LoraxError: no assistant turn; a turn that can't be found; an error of `render`.
  """
  turns = assistant_turns(chat)
  if not turns:
    raise LoraxError(
      "no message has the role assistant, so that nothing is learnt. Roles: "
      + ", ".join(message["role"] for message in chat.messages)
    )
  if learn == "last":
    turns = turns[-1:]
  if jinja.has_generation(template.text(chat)):
    text, spans = render_marked(template, chat)
    if learn == "last":
      start = _start(template, chat, text, turns[0])
      spans = [span for span in spans if span[1] > start]
    spans = [(start, end) for start, end in spans if end > start]
    if not spans:
      raise LoraxError(
        f"the chat template ({template.origin}) has {{% generation %}}, and marks"
        " nothing in this chat"
      )
  else:
    text = render(template, chat)
    spans = [_turn(template, chat, text, turn, markers) for turn in turns]
  return Marked(text, spans)


def _turn(
  template: ChatTemplate, chat: Chat, text: str, turn: int, markers: Markers
) -> Span:
  """The span of an assistant turn in the text of the chat."""
  start = _start(template, chat, text, turn)
  if turn == len(chat.messages) - 1:
    upto = text
  else:
    upto = render(template, replace(chat, messages=chat.messages[: turn + 1]))
  end = _end(text, upto, start, markers)
  if end is None:
    place = _shared(text, upto)
    raise LoraxError(
      f"{named(chat, turn)}: the chat template renders it with"
      f" {upto[place : place + _SHOWN]!r} where it is the last message, and with"
      f" {text[place : place + _SHOWN]!r} in the chat: {_LAST_ALONE}, or"
      f" {_OWN_TEMPLATE}"
    )
  if text[:start].rstrip().endswith(markers.greedy):
    # These spaces are within the header's last token, which the prompt has.
    start += len(text[start:end]) - len(text[start:end].lstrip())
  if end <= start:
    raise LoraxError(f"{named(chat, turn)}: the chat template prints nothing for it")
  return start, end


def _start(template: ChatTemplate, chat: Chat, text: str, turn: int) -> int:
  """Length of the prompt that the model is to produce this turn for."""
  try:
    before = replace(chat, messages=chat.messages[:turn])
    prompt = render(template, before, add_generation_prompt=True)
  except LoraxError as error:
    raise LoraxError(
      f"{named(chat, turn)}: what is before it can't be rendered alone, as its prompt"
      f" ({error}). Start the chat with another role, or {_OWN_TEMPLATE}"
    ) from error
  if text.startswith(prompt):
    return len(prompt)
  place = _shared(text, prompt)
  ways = _OWN_TEMPLATE
  if turn != assistant_turns(chat)[-1]:
    ways = f"{_LAST_ALONE}, or {ways}"
  raise LoraxError(
    f"{named(chat, turn)}: its prompt by the chat template has"
    f" {prompt[place : place + _SHOWN]!r} where the chat has"
    f" {text[place : place + _SHOWN]!r}, behind {place:,} equal characters, so that the"
    f" chat doesn't show the model what it will be given: {ways}"
  )


def _end(text: str, upto: str, start: int, markers: Markers) -> int | None:
  """The end of a turn that starts at `start`, or None where it is another text.

  Args:
    text: of the chat.
    upto: text of the chat up to and including the turn.
    start: of the turn, in `text`.
    markers: of the tokenizer.
  """
  if text.startswith(upto):
    turn = upto[start:].rstrip()
    return start + len(turn) if turn.endswith(markers.tokens) else len(upto)
  if not upto.startswith(text[:start]):
    return None
  # The chat's end may have a token of its own (Phi-3's), which no other turn has.
  shared = start + _shared(text[start:], upto[start:])
  one, glue = _patterns(markers.tokens)
  ends = [match.end() for match in one.finditer(text, start, shared)]
  return ends[-1] if ends and glue.fullmatch(upto, ends[-1]) else None


def _shared(one: str, other: str) -> int:
  """The number of characters that two texts begin with alike."""
  pairs = enumerate(zip(one, other, strict=False))
  shortest = min(len(one), len(other))
  return next((i for i, (x, y) in pairs if x != y), shortest)


@functools.lru_cache
def _patterns(tokens: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
  """A marker; and a text of markers and white space alone."""
  # The longest first, since one may be the beginning of another.
  names = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
  return re.compile(names), re.compile(rf"(?:\s|{names})*")
