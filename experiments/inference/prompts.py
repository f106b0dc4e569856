"""Lines of JSON, and the token ids of the prompts that they hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.data import chat, tokens
from lorax_flax.data.tokenize import check_characters
from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.errors import LoraxError, listing, prefixed, unknown
from lorax_flax.files import strict_json

PROMPT, MESSAGES, IDS = "prompt", "messages", "input_ids"
_MAIN = (PROMPT, MESSAGES, IDS)
# What a chat may have beside its messages.
_OF_CHATS = ("tools", "documents")


def read(
  file: Path,
  folder: Path,
  tokenizer: Tokenizer | None,
  vocab_size: int,
  chat_template: str | None = None,
) -> list[list[int]]:
  """The prompts of a file.

  Args:
    file: a line is {"prompt": …}, tokenised with the special tokens around a text;
      {"messages": …}, rendered by the chat template up to the assistant's answer; or
      {"input_ids": …} as they are.
    folder: of the model, or of the adapter whose tokenizer it is; has the template.
    tokenizer: None where there is none.
    vocab_size: number of tokens of the model.
    chat_template: a .jinja file in place of the folder's template.

  Raises:
    LoraxError: no such file, an empty one, or a line that can't be used; it names the
      line.
  """
  template: chat.ChatTemplate | None = None
  found = []
  for number, line in strict_json.lines(file):
    with prefixed(f"{file}: line {number}"):
      kind = _kind(line)
      if kind == IDS:
        ids = list(tokens.integers(line, IDS))
      elif tokenizer is None:
        raise LoraxError(f"has {kind!r}, and there is no tokenizer in {folder}")
      elif kind == PROMPT:
        ids = _encoded(line[PROMPT], tokenizer, special=True)
      else:
        template = template or chat.of_model(folder, chat_template)
        ids = of_chat(chat.check(line), tokenizer, template)
      if not ids:
        raise LoraxError("has no tokens")
      if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise LoraxError(f"has the id {wrong[0]}: ids go from 0 to {vocab_size - 1}")
      found.append(ids)
  return found


def of_chat(
  made: chat.Chat, tokenizer: Tokenizer, template: chat.ChatTemplate
) -> list[int]:
  """Token ids of a chat, up to the assistant's answer that comes next."""
  text = chat.render(template, made, add_generation_prompt=True)
  return _encoded(text, tokenizer, special=False)


def _kind(line: Mapping[str, Any]) -> str:
  kinds = [name for name in _MAIN if name in line]
  known = (*_MAIN, *_OF_CHATS)
  for name in line:
    if name not in known:
      raise LoraxError(f"has an {unknown('name', name, known)}")
  if len(kinds) != 1:
    raise LoraxError(f"has {listing(kinds) or 'no prompt'}: one of {listing(_MAIN)}")
  if kinds[0] != MESSAGES and len(line) > 1:
    raise LoraxError(f"has {min(set(line) - {kinds[0]})!r}, which is of chats alone")
  return kinds[0]


def _encoded(text: Any, tokenizer: Tokenizer, *, special: bool) -> list[int]:
  if not isinstance(text, str):
    raise LoraxError(f"{PROMPT} is a string, not {text!r:.80}")
  check_characters(text)
  try:
    return list(tokenizer.encode(text, add_special_tokens=special).ids)
  # The tokenizers library raises bare Exception where its file is incomplete.
  except Exception as error:
    raise LoraxError(f"this tokenizer can't encode the text: {error}") from error
