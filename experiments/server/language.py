"""A language model and its adapters, which all answer from the rows of one engine."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.server import folder, voice
from experiments.server.bank import Bank
from experiments.server.voice import Voice
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.methods import Adapter
from lorax_flax.models import gguf
from lorax_flax.models.registry import Loaded
from lorax_flax.serve import decoder
from lorax_flax.serve import generate as generation
from lorax_flax.serve.engine import Engine
from lorax_flax.serve.request import Piece, Request, Running
from lorax_flax.serve.settings import Decoding

log = logging.getLogger(__name__)


class _Served(NamedTuple):
  slot: int | None
  voice: Voice


class Language:
  """Texts of a base, under its name, and of its adapters, under theirs.

  Attributes:
    base: name of the base.
    engine: that writes.
  """

  def __init__(
    self,
    loaded: Loaded,
    name: str,
    root: Path | None,
    *,
    capacity: int,
    max_rank: int,
    chat_template: str | None = None,
    **options: Any,
  ):
    """Loads the adapters of a folder; those that don't fit are logged and left out.

    Args:
      loaded: the base.
      name: its name.
      root: the folder of adapters; None: the base alone is served, and no other.
      capacity: number of adapters in memory.
      max_rank: the largest rank of one.
      chat_template: a .jinja file in place of the models' own.
      **options: of `Engine`.

    Raises:
      LoraxError: no tokenizer, or no such folder.
    """
    self.base = name
    self._loaded, self._root, self._chat_template = loaded, root, chat_template
    self._lock = threading.Lock()
    self._served = {name: _Served(None, self._voice(None))}
    writer, params = generation.writer(loaded), None
    found = {each: self._attempt(each) for each in folder.names(root)}
    examples = {each: adapter for each, adapter in found.items() if adapter}
    self._bank: Bank | None = None
    if root is not None:
      self._bank = Bank(loaded, examples, capacity, max_rank)
      mixed = decoder.decoder_of(loaded, decoder.many(loaded))
      writer, params = dataclasses.replace(writer, decoder=mixed), self._bank.params
    self.engine = Engine(writer, params, **options)
    for each, adapter in examples.items():
      try:
        self._serve(each, adapter, each)
      except LoraxError as error:
        log.error(f"the adapter {each} is left out: {error}")

  @property
  def models(self) -> list[str]:
    """The names that answer, the base's first."""
    return list(self._served)

  def voice(self, model: str) -> Voice:
    """The tokenizer of a name."""
    return self._known(model).voice

  def submit(
    self,
    model: str,
    prompt: Sequence[int],
    decoding: Decoding,
    number: int,
    listener: Callable[[Piece], None],
  ) -> Running:
    """Takes a request; errors are those of `Engine.submit`."""
    # Together: the slot is not to be given to another adapter before it is asked for.
    with self._lock:
      slot, own = self._known(model)
      request = Request(prompt, decoding, own.tokenizer, slot, number)
      return self.engine.submit(request, listener)

  def load(self, name: str, path: str) -> None:
    """Serves an adapter of the folder under a name; compiles nothing.

    It takes the place of one of this name, whose texts are finished.

    Raises:
      LoraxError: no such folder, or an adapter that doesn't fit: the error names the
        weight, and what was there stays.
    """
    if name == self.base:
      raise LoraxError(f"{name} is the name of the base")
    self._serve(name, self._read(path), path)

  def unload(self, name: str) -> None:
    """Forgets an adapter; its texts are finished."""
    if name == self.base:
      raise LoraxError(f"{name} is the base, which stays")
    with self._lock:
      check_known("adapter", name, self._served.keys() - {self.base})
      self._retire(self._served.pop(name).slot)

  def close(self) -> None:
    """Takes no more requests, and returns once all have been answered."""
    self.engine.close()

  def _known(self, model: str) -> _Served:
    check_known("model", model, self._served)
    return self._served[model]

  def _serve(self, name: str, adapter: Adapter, path: str) -> None:
    if self._bank is None:
      raise LoraxError("this server has no folder of adapters: --adapters=DIR")
    bank, own = self._bank, self._voice(folder.find(self._root, path))
    slot = self.engine.call(lambda: bank.put(adapter)).result()
    with self._lock:
      before = self._served.get(name)
      self._served[name] = _Served(slot, own)
      if before is not None:
        self._retire(before.slot)

  def _retire(self, slot: int | None) -> None:
    """Frees a slot once no text needs it."""

    def clear() -> None:
      if self.engine.uses(slot):
        self.engine.call(clear)
      elif slot is not None and self._bank is not None:
        self._bank.clear(slot)

    self.engine.call(clear)

  def _voice(self, adapter: Path | None) -> Voice:
    size = self._loaded.config.vocab_size
    return voice.load(self._loaded.folder, adapter, size, self._chat_template)

  def _attempt(self, path: str) -> Adapter | None:
    try:
      return self._read(path)
    except LoraxError as error:
      log.error(f"the adapter {path} is left out: {error}")
      return None

  def _read(self, path: str) -> Adapter:
    found, loaded = folder.find(self._root, path), self._loaded
    needs = adapters.needs(found, loaded.keymap)
    rows = loaded.config.vocab_size
    for what, differs in (
      ("a base whose tied tables have a weight each", needs.untie),
      (f"{needs.vocab_size} tokens", needs.vocab_size not in (None, rows)),
      ("stacked layers", needs.scan),
    ):
      if differs:
        raise LoraxError(f"{found.name} needs {what}: this base is served as it is")
    heads = gguf.heads(loaded.config)
    return adapters.read(found, loaded.params, loaded.keymap, heads=heads).adapter
