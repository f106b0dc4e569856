"""Batches of any structure as flat columns, without end and resumable.

A batch is a pytree of arrays with a leading axis B; its leaves become columns named by
their number, beside `weights`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lorax_flax.errors import LoraxError


@dataclass(frozen=True)
class Layout:
  """The structure of a batch."""

  tree: Any

  def columns(self, batch: Any) -> dict[str, np.ndarray]:
    """The columns of a batch of this layout, each example of weight 1.

    Raises:
      LoraxError: another structure, or leaves without a common leading axis.
    """
    leaves, tree = jax.tree.flatten(batch)
    if tree != self.tree:
      raise LoraxError(f"batches differ in structure: {tree}, and before {self.tree}")
    arrays = [np.asarray(leaf) for leaf in leaves]
    sizes = {x.shape[:1] for x in arrays}
    if len(sizes) != 1 or not all(sizes):
      shapes = [x.shape for x in arrays]
      raise LoraxError(f"a batch's arrays have no common leading axis: {shapes}")
    columns = {str(i): x for i, x in enumerate(arrays)}
    return columns | {"weights": np.ones(sizes.pop(), np.float32)}

  def batch(self, columns: Mapping[str, Any]) -> Any:
    """The batch of these columns."""
    leaves = [columns[str(i)] for i in range(self.tree.num_leaves)]
    return jax.tree.unflatten(self.tree, leaves)


class Stream:
  """The columns of an iterable's batches, started anew where it ends, and the position.

  Attributes:
    layout: structure of the batches.
    first: columns of the first batch.
  """

  def __init__(self, batches: Iterable[Any]):
    """Takes the first batch, which is not counted as taken.

    Raises:
      LoraxError: there is none.
    """
    self._batches, self._iterator = batches, iter(batches)
    self._taken, self._ahead = 0, False
    self._start = self.get_state()
    self._first = self._read()
    self._ahead = True
    self.layout = Layout(jax.tree.structure(self._first))
    self.first = self.layout.columns(self._first)

  def __next__(self) -> dict[str, np.ndarray]:
    return self.layout.columns(self._take())

  def _take(self) -> Any:
    batch = self._first if self._ahead else self._read()
    self._ahead = False
    self._taken += 1
    return batch

  def _read(self) -> Any:
    try:
      return next(self._iterator)
    except StopIteration:
      again = iter(self._batches)
    if again is self._iterator:
      raise LoraxError(f"the iterator over batches ended after {self._taken}")
    self._iterator = again
    try:
      return next(self._iterator)
    except StopIteration:
      raise LoraxError("there are no batches") from None

  def get_state(self) -> dict[str, Any]:
    """The position, JSON-able."""
    if self._ahead:
      return self._start
    state: dict[str, Any] = {"taken": self._taken}
    if hasattr(self._iterator, "get_state"):
      state["iterator"] = self._iterator.get_state()
    return state

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a position: by the iterator's own, or by passing over batches."""
    if "iterator" in state and hasattr(self._iterator, "set_state"):
      self._iterator.set_state(state["iterator"])
      self._ahead, self._taken = False, state["taken"]
    while self._taken < state["taken"]:
      self._take()
