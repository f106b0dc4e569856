"""Classifiers of texts over the weights of one base, by name."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.inference import merged, probabilities
from experiments.server import folder
from lorax_flax.adapt.paths import flatten, map_with_path
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.models.registry import Loaded
from lorax_flax.quant import is_quantized
from lorax_flax.serve.classifier import Classifier
from lorax_flax.serve.request import Busy, Closed


class Scored(NamedTuple):
  """Scores of texts.

  Attributes:
    labels: names of the outputs.
    scores_NxC: probabilities, each label's own where a text may have several; of a
      regression, its value.
    tokens: of all texts.
  """

  labels: tuple[str, ...]
  scores_NxC: np.ndarray
  tokens: int


class _Served(NamedTuple):
  classifier: Classifier
  labels: tuple[str, ...]
  problem_type: str | None


class Classifiers:
  """The base, where it has a head, and its adapters, which bring theirs.

  Attributes:
    base: name of the base.
    task: of the base's family.
  """

  def __init__(
    self,
    loaded: Loaded,
    name: str,
    root: Path | None,
    *,
    waiting: int = 64,
    quant: str | None = None,
    other_base: bool = False,
  ):
    """Loads the adapters of a folder; those that don't fit are logged and left out.

    Args:
      loaded: the base.
      waiting: number of requests that are answered or wait at once.
      quant: with which the base was loaded.
      other_base: whether adapters of other bases are served.

    Raises:
      LoraxError: nothing that answers.
    """
    self.base = name
    self.task: str = loaded.family.task
    self._loaded, self._root = loaded, root
    self._quant, self._other_base = quant, other_base
    self._shared = flatten(loaded.params)
    self._served: dict[str, _Served] = {}
    self._turn, self._room = threading.Lock(), threading.BoundedSemaphore(waiting)
    self._waiting, self._closed = waiting, False
    if not loaded.new_paths:
      self._served[name] = self._made(None)
    for each in folder.names(root):
      with folder.leaving_out(each):
        self.load(each, each)
    if not self._served:
      raise LoraxError(f"{name} has no head of its own, and no adapter brings one")

  @property
  def models(self) -> list[str]:
    """The names that answer, the base's first."""
    return list(self._served)

  def load(self, name: str, path: str) -> None:
    """Serves an adapter of the folder under a name, in place of one of this name.

    Raises:
      LoraxError: no such folder, or an adapter that doesn't fit; what was there stays.
    """
    if name == self.base:
      raise LoraxError(f"{name} is the name of the base")
    found = folder.find(self._root, path)
    self._served = {**self._served, name: self._made(found)}

  def unload(self, name: str) -> None:
    """Forgets an adapter."""
    check_known("adapter", name, self._served.keys() - {self.base})
    self._served = {n: each for n, each in self._served.items() if n != name}

  def scores(self, model: str, texts: Sequence[str]) -> Scored:
    """Scores of texts.

    Raises:
      LoraxError: an unknown name, or a text that can't be used.
      Busy: too many requests at once.
      Closed: the server is being shut down.
    """
    check_known("model", model, self._served)
    own = self._served[model]
    if self._closed:
      raise Closed("no more requests are taken: the server is being shut down")
    if not self._room.acquire(blocking=False):
      raise Busy(f"{self._waiting} requests are waiting: try again later")
    try:
      with self._turn:
        logits_NxC, tokens = own.classifier.logits(texts)
    finally:
      self._room.release()
    if not np.isfinite(logits_NxC).all():
      raise LoraxError("the model gives logits that are not finite")
    return Scored(
      own.labels, probabilities.scores(logits_NxC, own.problem_type), tokens
    )

  def warm(self) -> None:
    """Compiles what a first short request needs."""
    for name in self.models:
      self.scores(name, ["a"])

  def close(self) -> None:
    """Takes no more requests, and returns once all have been answered."""
    self._closed = True
    with self._turn:
      pass

  def _made(self, adapter: Path | None) -> _Served:
    source = None if adapter is None else str(adapter)
    folder = str(self._loaded.folder)
    model = merged.headed(folder, source, self._quant, self._other_base)
    loaded = model.loaded
    tokenizer = load_tokenizer(loaded.folder, source)
    # Without the weights that were read for this adapter and are the base's own.
    params = map_with_path(self._one, loaded.params)
    shared = dataclasses.replace(loaded, params=params)
    classifier = Classifier(shared, model.rest or {}, tokenizer)
    assert model.labels is not None
    return _Served(classifier, model.labels, model.problem_type)

  def _one(self, path: str, leaf: Any) -> Any:
    """The base's own array in place of its copy: one base for all."""
    own = self._shared.get(path, leaf)
    ours, theirs = _arrays(own), _arrays(leaf)
    if ours.keys() != theirs.keys():
      return leaf
    same = (
      x.dtype == theirs[name].dtype and np.array_equal(x, theirs[name])
      for name, x in ours.items()
    )
    return own if all(same) else leaf


def _arrays(leaf: Any) -> dict[str, Any]:
  return leaf.arrays() if is_quantized(leaf) else {"": leaf}
