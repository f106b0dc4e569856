"""Continuous batching: texts begin and end while the rows of one cache step together.

One thread calls the model. A request waits for a free row, its prompt is read alone,
and from then on its row steps with the others', each with its own settings, adapter
and end.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.serve import decoder, generate, history, rules, sampling, slots
from lorax_flax.serve import ends as ends_of
from lorax_flax.serve.generate import Writer
from lorax_flax.serve.request import Busy, Closed, Piece, Request, Running
from lorax_flax.serve.sampling import Tokens
from lorax_flax.serve.waiting import Waiting

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Rows = list[Running | None]


class Engine:
  """A model that writes many texts at once.

  Attributes:
    length: number of places of a row, for a prompt and what comes after it.
  """

  def __init__(
    self,
    writer: Writer,
    params: Callable[[Sequence[int | None]], Any] | None = None,
    *,
    rows: int = 8,
    length: int | None = None,
    waiting: int = 64,
    seconds: float = 300.0,
  ):
    """Starts its thread; `close` ends it.

    Args:
      writer: the model.
      params: (number of each row's adapter, None for the base) -> what the decoder
        takes; called by the engine's thread. None: the writer's, and no request has an
        adapter.
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
    self._writer, self._seconds = writer, seconds
    self._params = params or (lambda numbers: writer.params)
    self._eos_E = jnp.asarray(writer.ends.eos, jnp.int32)
    self._slots = slots.blank(writer.model, rows, self.length)
    self._rows: _Rows = [None] * rows
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
    """Runs a function between two steps, by the engine's thread."""
    future: Future[_Result] = Future()
    with self._condition:
      if self._closed:
        raise Closed("the server is being shut down")
      self._calls.append((future, function))
      self._condition.notify()
    return future

  def uses(self, adapter: int | None) -> bool:
    """True while a text of an adapter is written or waits; for the engine's thread."""
    with self._condition:
      every = [*self._rows, *self._waiting]
    return any(r is not None and r.request.adapter == adapter for r in every)

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
        log.exception("a step failed")
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
    self._rows = [None if r is None or r.check_time() else r for r in self._rows]
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
    request, row = running.request, self._rows.index(None)
    try:
      inputs = decoder.prompts([request.prompt], most=self.length)
      width = inputs["input_ids"].shape[1]
      logits_1xV, cache = self._writer.decoder.prefill(
        self._params([request.adapter]),
        inputs,
        self._writer.model.blank_cache(1, width),
      )
    except Exception as error:
      log.exception("a prompt failed")
      running.fail(_said(error))
      return
    self._slots, tokens = slots.admit(
      self._slots,
      np.int32(row),
      logits_1xV,
      cache,
      history.of([request.prompt], self.length),
      rules.of([request.decoding], np.array([request.number])),
      self._eos_E,
    )
    self._rows[row] = running
    self._unread.append(([running], tokens))

  def _step(self) -> None:
    """Asks for the next token of each row."""
    self._slots, tokens = _advance(
      self._writer,
      self._params([None if r is None else r.request.adapter for r in self._rows]),
      self._slots,
      self._eos_E,
      np.array([r is None for r in self._rows]),
    )
    self._unread.append((list(self._rows), tokens))

  def _read(self, rows: _Rows, tokens: Tokens) -> None:
    """Gives tokens to the requests that they are of."""
    ids_B, done_B, nan_B = jax.device_get(tokens)
    for i, running in enumerate(rows):
      if running is None or running.over:
        continue
      if nan_B[i]:
        running.fail(LoraxError("the model gives logits that are not finite"))
      else:
        running.push(int(ids_B[i]), bool(done_B[i]))
    self._rows = [None if r is None or r.over else r for r in self._rows]

  def _fail(self, error: Exception) -> None:
    """Ends all texts that are being written, and begins with free rows."""
    for running in self._rows:
      if running is not None:
        running.fail(_said(error))
    self._rows = [None] * len(self._rows)
    self._unread.clear()
    # The old ones may have been donated.
    self._slots = slots.blank(self._writer.model, len(self._rows), self.length)


def _advance(
  writer: Writer, params: Any, rows: slots.Slots, eos_E: Any, free_B: np.ndarray
) -> tuple[slots.Slots, Tokens]:
  carry, tokens = sampling.advance(
    writer.decoder.step, params, rows.carry, rows.rules, eos_E, free_B
  )
  return slots.Slots(carry, rows.rules), tokens


def _said(error: Exception) -> LoraxError:
  if isinstance(error, LoraxError):
    return error
  return LoraxError("the model failed; the server's log says why")
