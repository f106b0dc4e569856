"""A text that someone waits for: what was asked, and what is written so far."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.errors import LoraxError
from lorax_flax.serve.generate import Row
from lorax_flax.serve.settings import Decoding

log = logging.getLogger(__name__)


class Busy(LoraxError):
  """Refusal of a request for which there is no room now."""


class Closed(LoraxError):
  """Refusal of a request since no more are taken."""


class TimedOut(LoraxError):
  """End of a request that took longer than it may."""


@dataclass(frozen=True)
class Request:
  """A question and its settings.

  Attributes:
    prompt: token ids.
    decoding: settings.
    tokenizer: of its text; None: it has ids alone.
    adapter: name of the adapter that answers; None: the base.
    number: of the text among those of one seed, that its samples follow from.
  """

  prompt: Sequence[int]
  decoding: Decoding
  tokenizer: Tokenizer | None = None
  adapter: str | None = None
  number: int = 0


@dataclass(frozen=True)
class Piece:
  """The text that one token brings.

  Attributes:
    id: the token; None where an error is all there is.
    text: what has become certain with it; may be empty.
    finish: why it is the last piece; None where it is not.
    error: what ended the text before its end.
  """

  id: int | None
  text: str = ""
  finish: Literal["stop", "length", "error"] | None = None
  error: LoraxError | None = None


class Running:
  """A request from when it is taken to its end.

  Attributes:
    request: what was asked.
    over: True once nothing more is written: it has ended, failed or been cancelled.
  """

  def __init__(
    self,
    request: Request,
    ends: frozenset[int],
    seconds: float,
    listener: Callable[[Piece], None],
  ):
    """Starts without a token.

    Args:
      ends: ids that end the text.
      seconds: time that it may take from now on.
      listener: is given each piece, by the thread of the engine.
    """
    self.request, self.over = request, False
    self._row = Row(request.tokenizer, request.decoding.stop)
    self._ends, self._listener = ends, listener
    self._seconds, self._deadline = seconds, time.monotonic() + seconds

  @property
  def ids(self) -> list[int]:
    """The tokens so far."""
    return self._row.ids

  def cancel(self) -> None:
    """Ends it at the next token; no piece comes any more."""
    self.over = True

  def push(self, token: int, is_last: bool) -> None:
    """Takes the next token; one that comes after the end is left out."""
    if self.over:
      return
    self._row.push(token)
    stopped = self._row.stopped or token in self._ends
    if stopped or is_last:
      self.over = True
      self._tell(Piece(token, self._row.finish(), "stop" if stopped else "length"))
    else:
      self._tell(Piece(token, self._row.take()))

  def fail(self, error: LoraxError) -> None:
    """Ends it with an error."""
    if not self.over:
      self.over = True
      self._tell(Piece(None, finish="error", error=error))

  def check_time(self) -> bool:
    """Ends it where its time is over; tells whether it is over."""
    if not self.over and time.monotonic() > self._deadline:
      self.fail(TimedOut(f"the text was not ready within {self._seconds:g} seconds"))
    return self.over

  def _tell(self, piece: Piece) -> None:
    try:
      self._listener(piece)
    except Exception:
      # Whoever asked is gone; the others' texts go on.
      log.exception("a listener failed")
      self.over = True
