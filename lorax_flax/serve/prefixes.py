"""Tokens whose keys and values the rows of a cache hold, and which begin a prompt.

A row keeps its text's after the end, until another text takes the row.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from lorax_flax.serve.request import Running


class Kept(NamedTuple):
  """The text whose keys and values a row holds.

  Attributes:
    adapter: identity of the adapter that computed them.
    running: the request.
  """

  adapter: Hashable
  running: Running

  @property
  def tokens(self) -> list[int]:
    """The tokens that are known to be in the row: all that were read but the last."""
    return [*self.running.request.prompt, *self.running.ids[:-1]]

  @property
  def most(self) -> int:
    """The largest number of tokens that the row may hold."""
    request = self.running.request
    return len(request.prompt) + request.decoding.max_new_tokens


def longest(
  rows: Iterable[Kept | None], adapter: Hashable, prompt: Sequence[int], columns: int
) -> tuple[int, int]:
  """The row that holds the most of a prompt's first tokens, and their number.

  The prompt's last token is never among them: its logits are to be computed.

  Args:
    adapter: the one that reads the prompt; rows of others are no use to it.
    columns: of the cache's smallest layer: where a row may have more tokens, a ring has
      overwritten what earlier ones attend to.

  Returns:
    (row, number of tokens); (-1, 0) for none.
  """
  best = -1, 0
  for row, kept in enumerate(rows):
    if kept is None or kept.adapter != adapter or kept.most > columns:
      continue
    pairs = zip(kept.tokens, prompt[:-1], strict=False)
    differ = (n for n, (held, asked) in enumerate(pairs) if held != asked)
    number = next(differ, min(len(kept.tokens), len(prompt) - 1))
    if number > best[1]:
      best = row, number
  return best
