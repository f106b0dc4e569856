"""Continuous batching: texts begin and end while the rows of one cache step together.

One thread calls the model. A request waits for a free row, its prompt is read alone,
and from then on its row steps with the others', each with its own settings, adapter
and end.
"""

import functools
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.models.cache import Cache
from lorax_flax.serve import decoder, generate, history, prefixes, rules, slots
from lorax_flax.serve import ends as ends_of
from lorax_flax.serve.generate import Writer
from lorax_flax.serve.prefixes import Kept
from lorax_flax.serve.request import Busy, Closed, Piece, Request, Running
from lorax_flax.serve.sampling import Tokens
from lorax_flax.serve.waiting import Waiting

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Rows = list[Running | None]


class Params(Protocol):
  """Params of the decoder, by the adapter of each row; the engine's thread calls it.

  There are as many slots as rows, so that each row finds one.
  """

  def acquire(self, name: str | None) -> int:
    """The slot of an adapter until `release`; -1 for the base, whose name is None."""

  def release(self, slot: int) -> None:
    """Ends one use of a slot."""

  def identity(self, slot: int) -> Hashable:
    """Value that no other adapter than the one in an acquired slot has ever had."""

  def of(self, slots: Sequence[int]) -> Any:
    """The decoder's params, of the slot of each row; -1 for the base."""


class Engine:
  """A model that writes many texts at once.

  Attributes:
    length: number of places of a row, for a prompt and what comes after it.
    reused: number of tokens of prompts that were not computed, since a row held them.
  """

  def __init__(
    self,
    writer: Writer,
    params: Params,
    *,
    rows: int = 8,
    length: int | None = None,
    waiting: int = 64,
    seconds: float = 300.0,
  ):
    """Starts its thread; `close` ends it.

    Args:
      writer: the model.
      params: of its adapters.
      rows: number of texts that are written at once.
      length: None takes the model's.
      waiting: number of requests that may wait for a row.
      seconds: time that a request may take, waiting included.

    Raises:
      LoraxError: a model with an encoder, or without room for this length.
    """
    if generate.has_encoder(writer.model):
      name = writer.model.hf_config["model_type"]
      raise LoraxError(f"a {name} reads each prompt with its encoder: it keeps no rows")
    self.length = length or writer.model.max_length
    self._writer, self._params, self._seconds = writer, params, seconds
    self._eos_E = jnp.asarray(writer.ends.eos, jnp.int32)
    self._slots = slots.blank(writer.model, rows, self.length)
    self._rows: _Rows = [None] * rows
    self._held = [-1] * rows  # the slot of each row's adapter
    self.reused = 0
    self._kept: list[Kept | None] = [None] * rows
    # Rows by when they were given, the least recent first.
    self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(rows))
    # Tokens that were asked for and not read, each with what its rows had then.
    self._unread: deque[tuple[_Rows, Tokens]] = deque()
    self._waiting: Waiting[Running] = Waiting(waiting)
    self._calls: deque[tuple[Future, Callable[[], Any]]] = deque()
    self._condition = threading.Condition()
    self._closed = False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  @property
  def waiting(self) -> int:
    """Number of requests that wait for a row."""
    with self._condition:
      return len(self._waiting)

  @property
  def running(self) -> int:
    """Number of texts that are being written."""
    return sum(row is not None for row in self._rows)

  def submit(self, request: Request, listener: Callable[[Piece], None]) -> Running:
    """Takes a request.

    Args:
      listener: is given its pieces, by the engine's thread; must not wait.

    Raises:
      LoraxError: a request that has no room, or of beams.
      Busy: so many wait already.
      Closed: the engine has been closed.
    """
    decoding, tokens = request.decoding, len(request.prompt)
    if decoding.beams > 1:
      raise LoraxError(f"beams={decoding.beams}: a search has no text before its end")
    if not tokens:
      raise LoraxError("the prompt has no tokens")
    if tokens + decoding.max_new_tokens > self.length:
      raise LoraxError(
        f"the prompt has {tokens} tokens, and up to {decoding.max_new_tokens} come "
        f"after it: there is room for {self.length} in all"
      )
    ends = self._writer.ends.eos
    if request.tokenizer is not None:
      ends += ends_of.special_stops(decoding.stop, request.tokenizer)
    running = Running(request, frozenset(ends), self._seconds, listener)
    with self._condition:
      if self._closed:
        raise Closed("no more requests are taken: the server is being shut down")
      if self._waiting.full:
        raise Busy(f"{self._waiting.most} requests are waiting: try again later")
      self._waiting.put(request.adapter, running)
      self._condition.notify()
    return running

  def call(self, function: Callable[[], _Result]) -> Future[_Result]:
    """Runs a function between two steps, by the engine's thread.

    Raises:
      Busy: so many wait already.
      Closed: the engine has been closed.
    """
    future: Future[_Result] = Future()
    with self._condition:
      if self._closed:
        raise Closed("the server is being shut down")
      if len(self._calls) >= self._waiting.most:
        raise Busy(f"{len(self._calls)} calls are waiting: try again later")
      self._calls.append((future, function))
      self._condition.notify()
    return future

  def warm(self) -> None:
    """Compiles the steps of every number of rows; returns once they are there."""
    for size in slots.sizes(len(self._rows)):
      self.call(functools.partial(self._step, size)).result()

  def close(self) -> None:
    """Takes no more requests, and returns once all that were taken have ended."""
    with self._condition:
      self._closed = True
      self._condition.notify()
    self._thread.join()

  def _run(self) -> None:
    while self._has_work():
      try:
        self._turn()
      except Exception as error:
        self._fail(error)

  def _has_work(self) -> bool:
    """Waits for something to do; False once there is nothing left and never will be."""
    idle = lambda: not (self._waiting or self._calls or self._unread or self.running)
    with self._condition:
      self._condition.wait_for(lambda: self._closed or not idle())
      return not idle()

  def _turn(self) -> None:
    """Runs what was called for, begins a text, steps all, and reads their last step."""
    with self._condition:
      calls, self._calls = self._calls, deque()
    for future, function in calls:
      try:
        future.set_result(function())
      except Exception as error:
        future.set_exception(error)
    with self._condition:
      self._waiting.drop(Running.check_time)
    self._free(Running.check_time)
    # One a turn, so that the others' next token waits for one prompt at most.
    self._admit()
    if self.running:
      self._step()
    # The last one is read while the next one runs.
    while len(self._unread) > bool(self.running):
      self._read(*self._unread.popleft())

  def _admit(self) -> None:
    """Reads the prompt of the next request into a free row."""
    if None not in self._rows:
      return
    with self._condition:
      running = self._waiting.take()
    if running is None:
      return
    request, slot = running.request, -1
    try:
      slot = self._params.acquire(request.adapter)
      adapter = self._params.identity(slot)
      source, cache, inputs = self._begun(adapter, request.prompt)
      params = self._params.of([slot])
      logits_1xV, cache = self._writer.decoder.prefill(params, inputs, cache)
    except Exception as error:
      self._params.release(slot)
      running.fail(_said(error))
      return
    # A row whose beginning stays what it was; or the one that was given longest ago.
    free = [row for row in self._order if self._rows[row] is None]
    row = source if source in free else free[0]
    self._slots, tokens = slots.admit(
      self._slots,
      np.int32(row),
      logits_1xV,
      cache,
      history.of([request.prompt], self.length),
      rules.of([request.decoding], np.array([request.number])),
      self._eos_E,
    )
    self._rows[row], self._held[row] = running, slot
    self._kept[row] = Kept(adapter, running)
    self._order.move_to_end(row)
    self._unread.append(([running], tokens))

  def _begun(
    self, adapter: Hashable, prompt: Sequence[int]
  ) -> tuple[int, Cache, dict[str, np.ndarray]]:
    """The row that holds a prompt's beginning, a cache with it, and the rest to read.

    The row is -1 where there is none whose beginning makes the rest shorter, padded.
    """
    full = decoder.prompts([prompt], most=self.length)
    width = full["input_ids"].shape[1]
    columns = self._slots.carry.state.columns
    row, number = prefixes.longest(self._kept, adapter, prompt, columns)
    rest = decoder.prompts([prompt[number:]], most=self.length)
    if rest["input_ids"].shape[1] == width:
      return -1, self._writer.model.blank_cache(1, width), full
    self.reused += number
    # As long as the rows, so that one program for each length of the rest is compiled.
    return row, slots.copied(self._slots, np.int32(row), np.int32(number)), rest

  def _step(self, least: int = 1) -> None:
    """Asks for the next token of each row that writes.

    Args:
      least: number of rows that the step has at least.
    """
    needed = max(self.running, least)
    size = next(n for n in slots.sizes(len(self._rows)) if n >= needed)
    # Those that are free come last, and fill what is left of the step.
    chosen = sorted(range(len(self._rows)), key=lambda row: self._rows[row] is None)
    chosen = sorted(chosen[:size])
    rows = [self._rows[row] for row in chosen]
    self._slots, tokens = slots.advance(
      self._writer.decoder.step,
      self._params.of([self._held[row] for row in chosen]),
      self._slots,
      np.array(chosen, np.int32),
      self._eos_E,
      np.array([running is None for running in rows]),
    )
    self._unread.append((rows, tokens))

  def _read(self, rows: _Rows, tokens: Tokens) -> None:
    """Gives tokens to the requests that they are of."""
    ids_B, done_B, nan_B = jax.device_get(tokens)
    for i, running in enumerate(rows):
      if running is None or running.over:
        continue
      if nan_B[i]:
        self._kept = [
          None if kept is not None and kept.running is running else kept
          for kept in self._kept
        ]
        running.fail(LoraxError("the model gives logits that are not finite"))
      else:
        running.push(int(ids_B[i]), bool(done_B[i]))
    self._free(lambda running: running.over)

  def _free(self, over: Callable[[Running], bool]) -> None:
    """Takes the texts that are over out of their rows."""
    for row, running in enumerate(self._rows):
      if running is not None and over(running):
        self._params.release(self._held[row])
        self._rows[row], self._held[row] = None, -1

  def _fail(self, error: Exception) -> None:
    """Ends all texts that are being written, and begins with free rows."""
    told = _said(error)
    for running in self._rows:
      if running is not None:
        running.fail(told)
    self._free(lambda running: True)
    self._unread.clear()
    self._kept = [None] * len(self._rows)
    # The old ones may have been donated.
    self._slots = slots.blank(self._writer.model, len(self._rows), self.length)


def _said(error: Exception) -> LoraxError:
  """The error that whoever asked is told; a fault of ours is for the log."""
  if isinstance(error, LoraxError):
    return error
  log.error("the model failed", exc_info=error)
  return LoraxError("the model failed; the server's log says why")
