"""Early stopping of runs that train together: when and on what they are judged."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.train.evaluate import Batches


@dataclass(frozen=True)
class Standing:
  """Progress of a run among those that share a program.

  Attributes:
    scores: the primary metric by step, wherever it was judged.
    pruned, failed: step and reason of a run that has ended early, else None.
    complete: True for a run that has trained to its end.
  """

  scores: Mapping[int, float]
  pruned: Mapping[str, Any] | None = None
  failed: Mapping[str, Any] | None = None
  complete: bool = False


@dataclass(frozen=True)
class Judge:
  """Rule by which runs are stopped early.

  Attributes:
    name: of the rule, for people.
    steps: those after which a run is judged.
    examples: number of held-out examples that it is judged by.
    prunes: (standings of all runs, number of one of them that was just judged) ->
      whether it is stopped. A pure function: a resumed job decides the same again.
  """

  name: str
  steps: Collection[int]
  examples: int
  prunes: Callable[[Sequence[Standing], int], bool]


def sample(splits: Mapping[str, Batches], count: int) -> dict[str, Batches]:
  """About `count` held-out examples: batches at equal distances, of all lengths.

  Raises:
    LoraxError: there are none.
  """
  if not splits:
    raise LoraxError(
      "trials are judged by held-out examples, and there are none: give the data a "
      "validation split, or leave --prune out"
    )
  share = -(-count // len(splits))
  return {name: _sample(batches, share) for name, batches in splits.items()}


def _sample(batches: Batches, count: int) -> Batches:
  size = len(batches[0]["index"])
  number = min(len(batches), -(-count // size))
  places = np.linspace(0, len(batches) - 1, number).round().astype(int)
  found, seen = [], 0
  for place in places:
    batch = batches[place]
    real_B = batch["index"] >= 0
    index_B = np.where(real_B, seen + np.cumsum(real_B) - 1, -1)
    found.append({**batch, "index": index_B.astype(batch["index"].dtype)})
    seen += int(real_B.sum())
  return found
