"""Text of tokens as they come: no piece of it changes later.

A token may be a part of a character, or decide what the bytes before it are. What is
not certain yet is held back, and so is what may begin a stop string.
"""

import re
from collections.abc import Sequence

from lorax_flax.data.tokenizers.tokenizer import Tokenizer

# The text of bytes that are no character, or not one yet.
_BROKEN = "\ufffd"
# A token that is a byte. A run of them is decoded together, and to broken characters
# throughout where it is not UTF-8.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
# Tokens that are decoded at once, and those that are kept of them for the next ones.
_WINDOW, _KEPT = 32, 8


class Detokenizer:
  """Pieces of the text of one row's tokens; together `tokenizer.decode` of them all."""

  def __init__(self, tokenizer: Tokenizer):
    self._backend = tokenizer.backend
    added = self._backend.get_added_tokens_decoder()
    self._skipped = {number for number, token in added.items() if token.special}
    self._ids: list[int] = []
    self._bytes = 0  # number of tokens that are bytes at the end
    self._given = 0  # number of characters of the ids' text that were given out

  def push(self, token: int) -> str:
    """The text that is certain after one more token; it may be empty."""
    name = self._backend.id_to_token(token)
    if token in self._skipped or name is None:
      return ""
    self._ids.append(token)
    self._bytes = self._bytes + 1 if _BYTE.match(name) else 0
    if self._bytes:
      return ""
    text = self._decode(self._ids)
    piece = text[self._given :].removesuffix(_BROKEN)
    self._given += len(piece)
    if self._given == len(text) and len(self._ids) >= _WINDOW:
      self._let_go(text)
    return piece

  def finish(self) -> str:
    """The rest of the text: no token comes any more."""
    rest = self._decode(self._ids)[self._given :]
    self._given += len(rest)
    return rest

  def _decode(self, ids: Sequence[int]) -> str:
    return self._backend.decode(ids, skip_special_tokens=False)

  def _let_go(self, text: str) -> None:
    """Forgets the first tokens, where the last ones have a text without them.

    The first token of a text may lose a space, as it loses it each time; the text that
    follows is the same.
    """
    kept = self._ids[-_KEPT:]
    last = self._decode(kept)
    if last.strip() and text.endswith(last.lstrip()):
      self._ids, self._given = kept, len(last)


class StopStrings:
  """Text up to the first of some strings that is complete, piece by piece.

  Attributes:
    found: True once a string has been found: no text comes any more.
    rest: of the piece that completed it, what is after it.
  """

  def __init__(self, strings: Sequence[str]):
    self.found, self.rest = False, ""
    self._strings = tuple(strings)
    self._held = ""

  def push(self, piece: str) -> str:
    """The text that is before any of the strings, whatever comes next."""
    if self.found:
      return ""
    text = self._held + piece
    found = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
    self.found = bool(found)
    behind, end = (
      min(found) if found else (len(text), len(text) - self._beginning(text))
    )
    self.rest = text[behind:]
    self._held = text[end:]
    return text[:end]

  def finish(self) -> str:
    """The text that was held back, once no more comes."""
    rest = "" if self.found else self._held
    self._held = ""
    return rest

  def _beginning(self, text: str) -> int:
    """Length of the longest end of the text that begins one of the strings."""
    longest = max(map(len, self._strings), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
      if any(s.startswith(text[-size:]) for s in self._strings):
        return size
    return 0


class TextStream:
  """The text of one row's tokens, up to the first stop string, piece by piece."""

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    self._tokens, self._stop = Detokenizer(tokenizer), StopStrings(stop)

  @property
  def stopped(self) -> bool:
    """True once a stop string has been found."""
    return self._stop.found

  def push(self, token: int) -> str:
    """The text that is certain after one more token; it may be empty."""
    return "" if self.stopped else self._stop.push(self._tokens.push(token))

  def finish(self) -> str:
    """The rest of the text: no token comes any more."""
    if self.stopped:
      return ""
    return self._stop.push(self._tokens.finish()) + self._stop.finish()
