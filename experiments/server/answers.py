"""Texts that are being written for one request, piece by piece."""

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence

from experiments.server.language import Language
from lorax_flax.serve.request import Piece, Running
from lorax_flax.serve.settings import Decoding


class Answers:
  """The choices of a request: `n` for each prompt."""

  def __init__(
    self,
    language: Language,
    model: str,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    n: int,
  ):
    """Submits all choices, or none.

    Raises:
      LoraxError: as of `Language.submit`.
    """
    self.prompt_tokens = sum(map(len, prompts))
    self.tokens = 0
    self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    self._running: list[Running] = []
    loop = asyncio.get_running_loop()
    try:
      for index in range(len(prompts) * n):
        listener = functools.partial(self._tell, loop, index)
        prompt, number = prompts[index // n], index % n
        running = language.submit(model, prompt, decoding, number, listener)
        self._running.append(running)
    except BaseException:
      self.cancel()
      raise

  def __len__(self) -> int:
    return len(self._running)

  async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces as they come, each with the number of its choice.

    Raises:
      LoraxError: what ended a text before its end; the others are ended too.
    """
    left = len(self._running)
    try:
      while left:
        index, piece = await self._queue.get()
        if piece.error is not None:
          raise piece.error
        left -= piece.finish is not None
        self.tokens += 1
        yield index, piece
    finally:
      self.cancel()

  def cancel(self) -> None:
    """Ends what is still written."""
    for running in self._running:
      running.cancel()

  def _tell(self, loop: asyncio.AbstractEventLoop, index: int, piece: Piece) -> None:
    """Hands a piece over from the engine's thread."""
    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))
