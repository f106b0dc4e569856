"""A language model and its adapters, which all answer from the rows of one engine."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.server import folder, voice
from experiments.server.voice import Voice
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.hub.adapters import any as readers
from lorax_flax.methods import Adapter
from lorax_flax.models import gguf, with_adapter
from lorax_flax.models.registry import Loaded
from lorax_flax.serve import bank, decoder, embeddings
from lorax_flax.serve import generate as generation
from lorax_flax.serve.adapters import Adapters
from lorax_flax.serve.bank import Alone, Bank
from lorax_flax.serve.engine import Engine
from lorax_flax.serve.request import Piece, Request, Running
from lorax_flax.serve.settings import Decoding

# Of adapters that are in no slot; beyond this they are read again from their folders.
_HOST_BYTES = 1 << 30
# Adapters that are loaded later have a rank of at least this.
_LEAST_RANK = 16
# Of the texts that are written before any is asked for.
_WARM = Decoding(max_new_tokens=2)
# Texts whose vectors are computed between two steps.
_TOGETHER = 8


class Language:
  """Texts of a base, under its name, and of its adapters, under theirs.

  Attributes:
    base: name of the base.
    task: of the base's family.
    engine: that writes.
  """

  def __init__(
    self,
    loaded: Loaded,
    name: str,
    root: Path | None,
    *,
    rows: int,
    capacity: int,
    max_rank: int | None,
    chat_template: str | None = None,
    other_base: bool = False,
    **options: Any,
  ):
    """Loads the adapters of a folder; those that don't fit are logged and left out.

    Args:
      loaded: the base.
      name: its name.
      root: the folder of adapters; None: the base alone is served, and no other.
      rows: number of texts that are written at once.
      capacity: number of adapters on the device, of any number.
      max_rank: the largest rank of one; None: of those in the folder, and at least 16.
      chat_template: a .jinja file in place of the models' own.
      other_base: whether adapters of other bases are served.
      **options: of `Engine`.

    Raises:
      LoraxError: no tokenizer, no such folder, or fewer slots than rows.
    """
    self.base = name
    self.task: str = loaded.family.task
    self._loaded, self._root = loaded, root
    self._check_base = None if other_base else with_adapter.base_check(loaded.folder)
    self._voice = voice.load(loaded.folder, loaded.config.vocab_size, chat_template)
    self._voices = {name: self._voice}
    writer = generation.writer(loaded, {})
    self._adapters: Adapters | None = None
    self._params: Bank | Alone = Alone(writer.params)
    fitting: dict[str, Adapter] = {}
    if root is not None:
      if capacity < rows:
        raise LoraxError(f"capacity={capacity}: the {rows} rows may need as many slots")
      self._adapters, fitting = self._slots(self._all(), capacity, max_rank)
      self._params = Bank(loaded.params, self._adapters)
      mixed = decoder.decoder_of(loaded, decoder.many(loaded))
      writer = dataclasses.replace(writer, decoder=mixed)
    self._embedder = embeddings.embedder(loaded, mixed=root is not None)
    self.engine = Engine(writer, self._params, rows=rows, **options)
    for each in [*fitting]:
      with folder.leaving_out(each):
        self._put(each, folder.find(root, each), fitting.pop(each))

  @property
  def models(self) -> list[str]:
    """The names that answer, the base's first."""
    return list(self._voices)

  def voice(self, model: str) -> Voice:
    """The tokenizer of a name."""
    check_known("model", model, self._voices)
    return self._voices[model]

  def submit(
    self,
    model: str,
    prompt: Sequence[int],
    decoding: Decoding,
    number: int,
    listener: Callable[[Piece], None],
  ) -> Running:
    """Takes a request; errors are those of `Engine.submit`."""
    own = self.voice(model).tokenizer
    adapter = None if model == self.base else model
    request = Request(prompt, decoding, own, adapter, number)
    return self.engine.submit(request, listener)

  def embed(self, model: str, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Vectors of texts, each of length 1: float32 (texts, features).

    Raises:
      LoraxError: a text without tokens or with too many; as of `Engine.call`.
    """
    self.voice(model)
    adapter, most = None if model == self.base else model, self.engine.length
    found = []
    for first in range(0, len(prompts), _TOGETHER):
      rows = prompts[first : first + _TOGETHER]
      size = 1 << (len(rows) - 1).bit_length()
      inputs = decoder.prompts([*rows, *[[0]] * (size - len(rows))], most=most)
      run = functools.partial(self._embedded, adapter, inputs)
      found.append(self.engine.call(run).result()[: len(rows)])
    return np.concatenate(found)

  def load(self, name: str, path: str) -> None:
    """Serves an adapter of the folder under a name; compiles nothing.

    It takes the place of one of this name, whose texts are finished.

    Raises:
      LoraxError: no such folder, or an adapter that doesn't fit: the error names the
        weight, and what was there stays.
    """
    found = folder.find(self._root, path)
    self._put(name, found, self._read(found))

  def unload(self, name: str) -> None:
    """Forgets an adapter; the texts that it is writing are finished."""
    if name == self.base:
      raise LoraxError(f"{name} is the base, which stays")
    check_known("adapter", name, self._voices.keys() - {self.base})
    assert self._adapters is not None
    self._voices.pop(name)
    self.engine.call(functools.partial(self._adapters.remove, name)).result()

  def warm(self) -> None:
    """Compiles what short requests need, alone or with others."""
    self.engine.warm()
    most = self.engine.length - _WARM.max_new_tokens
    for tokens in sorted({1, min(decoder.LEAST_WIDTH + 1, most)}):
      self._write([0] * tokens)

  def close(self) -> None:
    """Takes no more requests, and returns once all have been answered."""
    self.engine.close()

  def _write(self, prompt: Sequence[int]) -> None:
    """Writes a short text of the base."""
    ended = threading.Event()
    listener = lambda piece: ended.set() if piece.finish else None
    self.engine.submit(Request(prompt, _WARM), listener)
    ended.wait()

  def _embedded(self, adapter: str | None, inputs: Any) -> np.ndarray:
    slot = self._params.acquire(adapter)
    try:
      params = self._params.of([slot] * len(inputs["input_ids"]))
      return np.asarray(self._embedder(params, inputs))
    finally:
      self._params.release(slot)

  def _all(self) -> dict[str, Adapter]:
    """The adapters of the folder by name."""
    found: dict[str, Adapter] = {}
    for name in folder.names(self._root):
      with folder.leaving_out(name):
        found[name] = self._read(folder.find(self._root, name))
    return found

  def _slots(
    self, found: Mapping[str, Adapter], capacity: int, max_rank: int | None
  ) -> tuple[Adapters, dict[str, Adapter]]:
    """Slots for what the adapters change; without any, for all linear weights.

    With them the adapters that can share them, each with those before it.
    """
    params = self._loaded.params
    ranks = [delta.rank for adapter in found.values() for delta in adapter.values()]
    rank = max_rank or max([_LEAST_RANK, *ranks])
    many = bank.slots(self._loaded, capacity, rank)
    # One of each kind: adapters of the same shapes and settings need the same slots.
    kinds: dict[Any, Adapter] = {}
    fitting: dict[str, Adapter] = {}
    for name, adapter in found.items():
      with folder.leaving_out(name):
        leaves, structure = jax.tree.flatten(adapter)
        kind = structure, tuple(x.shape for x in leaves)
        if kind not in kinds:
          jax.eval_shape(many.empty, params, *kinds.values(), adapter)
          kinds[kind] = adapter
        fitting[name] = adapter
    examples = [*kinds.values()] or [bank.all_linear(self._loaded, rank)]
    slots = many.empty(params, *examples)
    return Adapters(many, params, slots, host_bytes=_HOST_BYTES), fitting

  def _put(self, name: str, path: Path, adapter: Adapter) -> None:
    """Serves an adapter that was read from this folder."""
    if name == self.base:
      raise LoraxError(f"{name} is the name of the base")
    assert self._adapters is not None  # Otherwise there is no folder.
    adapters, own = self._adapters, self._voice.of(path)

    def add() -> None:
      adapters.add(name, adapter, lambda: self._read(path))
      # Into a slot now, and not when the first request waits for it.
      adapters.release(adapters.acquire(name))

    self.engine.call(add).result()
    self._voices[name] = own

  def _read(self, found: Path) -> Adapter:
    """An adapter; LoraxError where the base would have to be another for it."""
    if self._check_base is not None:
      self._check_base(found)
    loaded = self._loaded
    needs = readers.needs(found, loaded.keymap)
    rows = loaded.config.vocab_size
    for what, differs in (
      ("a base whose tied tables have a weight each", needs.untie),
      (f"{needs.vocab_size} tokens", needs.vocab_size not in (None, rows)),
      ("stacked layers", needs.scan),
    ):
      if differs:
        raise LoraxError(f"{found.name} needs {what}: this base is served as it is")
    heads = gguf.heads(loaded.config)
    saved = readers.read(found, loaded.params, loaded.keymap, heads=heads)
    # The slots are of one dropout, and there is none where texts are written.
    return {path: _undropped(delta) for path, delta in saved.adapter.items()}


def _undropped(delta: Any) -> Any:
  dropped = getattr(delta, "dropout", 0.0) > 0
  return dataclasses.replace(delta, dropout=0.0) if dropped else delta
