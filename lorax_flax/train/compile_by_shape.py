"""A step compiled once for each shape of batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np


class Compiled:
  """Calls a jitted `(state, base, batch)` through one executable per batch shape.

  Compiling is a step of its own and not a part of the first call, so that it can be
  timed, logged, and kept out of the throughput.
  """

  def __init__(
    self, function: Any, around: Callable[[str], AbstractContextManager[None]]
  ):
    """`around(shape)` is entered for each compilation."""
    self._function = function
    self._around = around
    self._programs: dict[Any, Any] = {}

  def ready(self, batch: Any) -> bool:
    """True where a call with this batch compiles nothing."""
    return _shapes(batch) in self._programs

  def __call__(self, state: Any, base: Any, batch: Any) -> Any:
    shapes = _shapes(batch)
    if shapes not in self._programs:
      largest = max((shape for _, shape in shapes), key=lambda s: (len(s), s))
      with self._around("×".join(map(str, largest))):
        self._programs[shapes] = self._function.lower(state, base, batch).compile()
    return self._programs[shapes](state, base, batch)


def _shapes(batch: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple((name, np.shape(x)) for name, x in sorted(batch.items()))
