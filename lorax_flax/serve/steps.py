"""Steps of a model that writes tokens, and the loop that runs them.

A model is two functions. `step` (params, ids_B, state) -> (logits_BxV, state) reads a
token of each row, or of a row that has ended a negative id, whose logits are not used.
`take` (state, rows_R) -> state gives the rows with these numbers. The state is any
pytree, a cache of keys and values for one; it is donated.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

State = Any
Step = Callable[[Any, jax.Array, State], tuple[jax.Array, State]]
Take = Callable[[State, jax.Array], State]

_Carry = TypeVar("_Carry")
_Seen = TypeVar("_Seen")


def run(
  first: tuple[_Carry, _Seen],
  advance: Callable[[_Carry], tuple[_Carry, _Seen]],
  ended: Callable[[_Seen], bool],
  most: int,
) -> Iterator[tuple[_Carry, _Seen]]:
  """Runs up to `most` steps, the host reading each while the next one runs.

  Args:
    first: the outcome of the first step: (carry, what the host reads).
    advance: the step after a carry, which it may donate.
    ended: True where no more step is needed; one too many may have been started.
    most: number of steps, the first included.

  Yields:
    (the newest carry, what the host reads of a step), for each step in order.
  """
  carry, seen = first
  for _ in range(most - 1):
    carry, following = advance(carry)
    read = jax.device_get(seen)
    yield carry, read
    if ended(read):
      return
    seen = following
  yield carry, jax.device_get(seen)
