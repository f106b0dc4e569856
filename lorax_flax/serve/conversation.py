"""A text that a model and a person write in turns, and a stream of one answer."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.models.cache import Cache
from lorax_flax.serve import decoder, generate, history
from lorax_flax.serve.generate import Row, Start, Writer
from lorax_flax.serve.sampling import Carry
from lorax_flax.serve.settings import Decoding


class Conversation:
  """A text that grows, with the cache of its tokens."""

  def __init__(self, writer: Writer):
    """Starts with an empty text.

    Raises:
      LoraxError: a writer without a tokenizer.
    """
    if writer.tokenizer is None:
      raise LoraxError("a stream of text needs a tokenizer")
    self._writer = writer
    self._carry: Carry | None = None  # after the last token that was written

  @property
  def tokens(self) -> int:
    """Number of tokens of the text so far."""
    return 0 if self._carry is None else int(self._carry.history.lengths_B[0])

  def answer(
    self, prompt: Sequence[int], decoding: Decoding, *, number: int = 0
  ) -> Generator[str, None, None]:
    """Writes after a prompt; the caller may end it after any token.

    Of a prompt that begins as the text so far does, only the rest is read.

    Args:
      number: of the prompt, that its samples follow from as in `generate`.

    Yields:
      After each token the text that has become certain, which may be empty.

    Raises:
      LoraxError: as of `generate`; beams.
    """
    if decoding.beams > 1:
      raise LoraxError(f"beams={decoding.beams}: a search has no text before its end")
    generate.check_room(self._writer.model, len(prompt), decoding, number)
    row = Row(self._writer.tokenizer, decoding.stop)
    start = self._read(prompt, decoding)
    written = generate.sampled(self._writer, [row], start, [number], 1, decoding)
    try:
      for self._carry in written:
        yield row.take()
    except Exception:
      self._carry = None  # Its cache may have been donated.
      raise
    yield row.finish()

  def _read(self, prompt: Sequence[int], decoding: Decoding) -> Start:
    """The start after a prompt; what is in the cache already is not read again."""
    # An error on the way leaves a donated cache behind.
    carry, self._carry = self._carry, None
    writer, new = self._writer, decoding.max_new_tokens
    if generate.has_encoder(writer.model):
      return generate.prefilled(writer, [prompt], 1, decoding)
    kept = 0 if carry is None else _common(carry, prompt)
    most = writer.model.max_length
    inputs = decoder.prompts([prompt[kept:]], most=most)
    # Powers of two, so that few lengths are compiled.
    needed = max(len(prompt) + new, inputs["input_ids"].shape[1])
    length = min(most, 1 << (needed - 1).bit_length())
    if carry is None or kept == 0:
      cache: Cache = writer.model.blank_cache(1, length)
    else:
      cache = carry.state
      if cache.length < length:
        cache = cache.moved(writer.model.blank_cache(1, length))
      cache = dataclasses.replace(cache, lengths_B=jnp.array([kept], jnp.int32))
    logits_1xV, cache = writer.decoder.prefill(writer.params, inputs, cache)
    return logits_1xV, cache, history.of([prompt], cache.length)


def stream(
  writer: Writer, prompt: Sequence[int], decoding: Decoding, *, number: int = 0
) -> Iterator[str]:
  """Pieces of the text after one prompt, each as soon as it is certain.

  Arguments and errors are those of `Conversation` and its `answer`.
  """
  yield from filter(None, Conversation(writer).answer(prompt, decoding, number=number))


def _common(carry: Carry, prompt: Sequence[int]) -> int:
  """Number of the prompt's first tokens that the cache of a carry can go on from.

  The last one is always read, for its logits.
  """
  cached = int(carry.state.lengths_B[0])
  ids_N = np.asarray(carry.history.ids_BxN)[0, :cached]
  shared = min(cached, len(prompt) - 1)
  differs_N = ids_N[:shared] != np.asarray(prompt[:shared], np.int32)
  kept = int(differs_N.argmax()) if differs_N.any() else shared
  return kept if kept == cached or cached <= carry.state.columns else 0
