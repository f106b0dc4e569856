"""Texts that a model writes after prompts, in batches and as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.errors import LoraxError
from lorax_flax.methods import Adapter
from lorax_flax.models.cache import Cache
from lorax_flax.models.registry import Loaded, Outline
from lorax_flax.serve import beams, decoder, history, rules, sampling
from lorax_flax.serve import ends as ends_of
from lorax_flax.serve.decoder import Decoder
from lorax_flax.serve.ends import Ends
from lorax_flax.serve.history import History
from lorax_flax.serve.rules import Rules
from lorax_flax.serve.sampling import Carry
from lorax_flax.serve.settings import Decoding
from lorax_flax.serve.text import TextStream

# After prompts: the logits of the next tokens BxV, the cache and the history.
Start = tuple[jax.Array, Cache, History]


@dataclass(frozen=True)
class Writer:
  """A language model that writes.

  Attributes:
    model: its outline.
    decoder: prefill and step, compiled once for each shape.
    params: what these two take.
    ends: ids that end its texts.
    tokenizer: of its texts; None: there are only ids.
  """

  model: Outline
  decoder: Decoder
  params: Any
  ends: Ends
  tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Generated:
  """Tokens and text written after one prompt.

  Attributes:
    ids: the new tokens; the last is one that ends texts where the model ended it, and
      one that completes a stop string where there was one.
    text: theirs, without special tokens and up to a stop string; None without a
      tokenizer.
  """

  ids: tuple[int, ...]
  text: str | None


def writer(
  loaded: Loaded, rest: Adapter | None = None, tokenizer: Tokenizer | None = None
) -> Writer:
  """A loaded model that writes.

  Args:
    loaded: a model with a cache.
    rest: an adapter that is applied beside its weights, unmerged; None: there is none.
      Another one of any keys may take its place in `Writer.params`.
    tokenizer: of its texts.

  Raises:
    LoraxError: a model that doesn't generate, or generation settings that are not built
      here; see `ends.read`.
  """
  loaded.blank_cache(1, 1, 1)
  ends = ends_of.read(loaded.folder, loaded.hf_config, loaded.config.vocab_size)
  if has_encoder(loaded) and ends.start is None:
    raise LoraxError(f"{loaded.folder} has no decoder_start_token_id")
  if rest is not None:
    both = decoder.decoder_of(loaded, decoder.adapted(loaded))
    return Writer(loaded, both, (loaded.params, rest), ends, tokenizer)
  return Writer(loaded, decoder.decoder_of(loaded), loaded.params, ends, tokenizer)


def generate(
  writer: Writer,
  prompts: Sequence[Sequence[int]],
  decoding: Decoding,
  *,
  batch_size: int = 16,
) -> Iterator[tuple[int, Generated]]:
  """Writes a text after each prompt.

  Args:
    writer: the model.
    prompts: token ids, of any lengths; with an encoder, the source's.
    decoding: settings.
    batch_size: number of prompts that are continued together.

  Yields:
    (number of the prompt, what was written), of batch after batch: the shortest prompts
    first.

  Raises:
    LoraxError: a prompt without tokens, or with more than the model has room for beside
      the new ones; logits that are no numbers. It counts prompts as examples, from 1.
  """
  for number, prompt in enumerate(prompts):
    check_room(writer.model, len(prompt), decoding, number)
  size = min(batch_size, len(prompts))
  order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
  write: Any = _searched if decoding.beams > 1 else sampled
  for first in range(0, len(order), max(size, 1)):
    numbers = order[first : first + size].tolist()
    rows = [Row(writer.tokenizer, decoding.stop) for _ in numbers]
    prompts_B = [prompts[number] for number in numbers]
    start = prefilled(writer, prompts_B, size, decoding)
    for _ in write(writer, rows, start, numbers, size, decoding):
      pass
    yield from zip(numbers, (row.generated() for row in rows), strict=True)


class Row:
  """A row of a batch, written token by token.

  Attributes:
    ids: the new tokens.
    text: theirs, as far as it is certain.
  """

  def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]):
    if stop and tokenizer is None:
      raise LoraxError("stop: strings can't be found without a tokenizer")
    self.ids: list[int] = []
    self.text = ""
    self._taken = 0  # number of characters of the text
    self._stream = None if tokenizer is None else TextStream(tokenizer, stop)

  @property
  def stopped(self) -> bool:
    """True once a stop string has been found."""
    return self._stream is not None and self._stream.stopped

  def push(self, token: int) -> None:
    """Adds a token; one that was computed after the row's end is left out."""
    if token >= 0 and not self.stopped:
      self.ids.append(token)
      if self._stream is not None:
        self.text += self._stream.push(token)

  def take(self) -> str:
    """The text that was not taken before."""
    piece = self.text[self._taken :]
    self._taken += len(piece)
    return piece

  def finish(self) -> str:
    """The rest of the text, once no token comes any more."""
    return (self.generated().text or "")[self._taken :]

  def generated(self) -> Generated:
    """All of it, once no token comes any more."""
    text = None if self._stream is None else self.text + self._stream.finish()
    return Generated(tuple(self.ids), text)


def sampled(
  writer: Writer,
  rows: Sequence[Row],
  start: Start,
  numbers: Sequence[int],
  size: int,
  decoding: Decoding,
) -> Iterator[Carry]:
  """Writes a batch into its rows, greedily or by sampling.

  Args:
    rows: of the prompts, in order.
    start: after the prompts; its cache is donated.
    numbers: of the prompts among all, that samples follow from.
    size: number of rows of the batch; those after `rows` are not written.

  Yields:
    After each token, the carry of `sampling.tokens`.
  """
  eos = writer.ends.eos
  if writer.tokenizer is not None:
    eos += ends_of.special_stops(decoding.stop, writer.tokenizer)
  found = sampling.tokens(
    writer.decoder.step,
    writer.params,
    *start,
    _rules(decoding, numbers, size),
    eos=eos,
    stopped=lambda: np.array(
      [*(r.stopped for r in rows), *[True] * (size - len(rows))]
    ),
  )
  for carry, tokens in found:
    _check_numbers(tokens.nan_B, numbers)
    for row, token in zip(rows, tokens.ids_B.tolist(), strict=False):
      row.push(token)
    yield carry
    if all(row.stopped for row in rows):
      return


def _searched(
  writer: Writer,
  rows: Sequence[Row],
  start: Start,
  numbers: Sequence[int],
  size: int,
  decoding: Decoding,
) -> Iterator[None]:
  """Writes the best beams of a batch into its rows, all at once."""
  logits_BxV, cache, before = start
  starts_B = np.asarray(before.lengths_B)
  best, nan_B = beams.search(
    writer.decoder.step,
    Cache.take,
    writer.params,
    logits_BxV,
    cache,
    before,
    _rules(decoding, numbers, size),
    decoding,
    eos=writer.ends.eos,
    real_B=np.arange(size) < len(rows),
  )
  _check_numbers(nan_B, numbers)
  ids_BxN, ends_B = np.asarray(best.ids_BxN), np.asarray(best.lengths_B)
  for i, row in enumerate(rows):
    for token in ids_BxN[i, starts_B[i] : ends_B[i]].tolist():
      row.push(token)
  yield


def prefilled(
  writer: Writer, prompts: Sequence[Sequence[int]], size: int, decoding: Decoding
) -> Start:
  """The start after prompts; rows are filled up to size."""
  model, new = writer.model, decoding.max_new_tokens
  filled = [*prompts, *[[0]] * (size - len(prompts))]
  inputs = decoder.prompts(filled, most=model.max_length)
  width = inputs["input_ids"].shape[1]
  length = min(width + new, model.max_length)
  if writer.ends.start is not None and has_encoder(model):
    filled, length = [[writer.ends.start]] * size, 1 + new
    start_Bx1 = np.array(filled, np.int32)
    inputs["decoder_input_ids"] = start_Bx1
    inputs["decoder_attention_mask"] = np.ones_like(start_Bx1)
  cache = model.blank_cache(size, length, width)
  logits_BxV, cache = writer.decoder.prefill(writer.params, inputs, cache)
  return logits_BxV, cache, history.of(filled, length)


def _rules(decoding: Decoding, numbers: Sequence[int], size: int) -> Rules:
  numbers_B = np.zeros(size, np.int64)
  numbers_B[: len(numbers)] = numbers
  return rules.of([decoding] * size, numbers_B)


def _check_numbers(nan_B: np.ndarray, numbers: Sequence[int]) -> None:
  if nan_B.any():
    number = numbers[int(nan_B.argmax())] + 1
    raise LoraxError(f"example {number} gives logits that are not finite")


def check_room(model: Outline, tokens: int, decoding: Decoding, number: int) -> None:
  """Raises LoraxError unless there is room for a prompt and what comes after it."""
  if not tokens:
    raise LoraxError(f"example {number + 1} has no tokens")
  new = 0 if has_encoder(model) else decoding.max_new_tokens
  if tokens + new > model.max_length:
    beside = f", and max_new_tokens is {new}" if new else ""
    raise LoraxError(
      f"example {number + 1} has {tokens} tokens{beside}: the model takes "
      f"{model.max_length} in all"
    )


def has_encoder(model: Outline) -> bool:
  """True where the prompt is an encoder's."""
  return model.family.task == "seq2seq-lm"
