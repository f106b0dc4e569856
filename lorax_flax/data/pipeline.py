"""Batches: bucketed by length, shuffled by seed and epoch, resumable.

The order follows from (seed, epoch), so that a batch is a function of its number
and the number of the next batch is the full position. Every process has the full batch:
a run may resume with another number of processes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from lorax_flax.data.pairs import Pairs
from lorax_flax.data.pixels import Pixels
from lorax_flax.data.sequences import Sequences
from lorax_flax.data.tokens import Batch, Tokens
from lorax_flax.errors import LoraxError

# The rows of a split: what batches are made of.
Rows = Tokens | Sequences | Pairs | Pixels

# Lengths are a multiple of this, for the sake of vector units.
_MULTIPLE = 8
_MOST_UNITS = 512
# Rows are sorted by length among this many batches. More pad less, and shuffle less.
_WINDOW = 50
# Epochs in what grain takes for a finite sequence.
_ENDLESS = 1_000_000


@dataclass(frozen=True)
class Shape:
  """The shape of batches.

  Attributes:
    batch_size: number of rows of a batch, which every process has in full.
    buckets: padded lengths, ascending; each is compiled once. One bucket is padding to
      a fixed length.
  """

  batch_size: int
  buckets: tuple[int, ...]

  def __post_init__(self):
    if self.batch_size < 1:
      raise LoraxError(f"batch size is {self.batch_size}, and must be at least 1")
    ascending = list(self.buckets) == sorted(set(self.buckets))
    if not self.buckets or self.buckets[0] < 1 or not ascending:
      raise LoraxError(f"buckets must be ascending lengths, not {self.buckets}")

  def bucket_of(self, lengths_N: np.ndarray) -> np.ndarray:
    """The number of the smallest bucket that holds each length."""
    if len(lengths_N) and lengths_N.max() > self.buckets[-1]:
      raise LoraxError(
        f"a row has {lengths_N.max()} tokens, and the longest bucket {self.buckets[-1]}"
      )
    return np.searchsorted(self.buckets, lengths_N)


def steps_per_epoch(examples: int, batch_size: int) -> int:
  """Batches in an epoch. The last one is filled up with rows of weight 0."""
  return -(-examples // batch_size)


def choose_buckets(lengths_N: np.ndarray, count: int) -> tuple[int, ...]:
  """The at most `count` lengths that make for the least padding.

  Args:
    lengths_N: of the rows; take all splits together to share what is compiled.
    count: largest number of lengths.

  Returns:
    Ascending multiples of 8, the last of which holds the longest row.
  """
  if count < 1 or not len(lengths_N):
    raise LoraxError(f"can't choose {count} buckets for {len(lengths_N)} rows")
  # Of very long rows, coarser units: the time goes with the square of their number.
  longest = int(np.max(lengths_N))
  unit = _MULTIPLE * max(1, -(-longest // (_MULTIPLE * _MOST_UNITS)))
  units_N = -(-np.asarray(lengths_N) // unit)
  most = int(units_N.max())
  # rows[u]: number of rows of at most u units.
  rows = np.cumsum(np.bincount(units_N, minlength=most + 1))
  # Dynamic programming over the largest bucket: best[u] is, for the rows with at most
  # u units, (units with padding, number of buckets, the buckets), u being the last.
  best: list[tuple[int, int, tuple[int, ...]]] = [
    (int(rows[u]) * u, 1, (u,)) for u in range(most + 1)
  ]
  for _ in range(count - 1):
    best = [
      min(
        [
          best[u],
          *(
            (cost + int(rows[u] - rows[used[-1]]) * u, size + 1, (*used, u))
            for cost, size, used in best[1:u]
          ),
        ]
      )
      for u in range(most + 1)
    ]
  return tuple(units * unit for units in best[most][2])


def padding_share(lengths_N: np.ndarray, buckets: Sequence[int]) -> float:
  """The share of padding where each row is padded to the smallest bucket it fits."""
  shape = Shape(1, tuple(buckets))
  padded_N = np.asarray(buckets)[shape.bucket_of(lengths_N)]
  return 1.0 - float(np.sum(lengths_N)) / float(padded_N.sum())


def training_order(
  lengths_N: np.ndarray,
  shape: Shape,
  seed: int,
  epoch: int,
  within_N: np.ndarray | None = None,
) -> np.ndarray:
  """One epoch's rows by batch: int64 (batches, batch_size), -1 fills the last one up.

  A permutation of the rows is split into windows of 50 batches; in each, rows are
  sorted by bucket (and stay shuffled within a bucket); then the batches are shuffled.

  Args:
    within_N: number of another bucket, the decoder's, by which the rows of one bucket
      are sorted.
  """
  rng = np.random.default_rng((seed, epoch))
  rows = rng.permutation(len(lengths_N))
  keys_KxN = _sort_keys(lengths_N, shape, within_N)
  window = _WINDOW * shape.batch_size
  chunks = [rows[i : i + window] for i in range(0, len(rows), window)]
  order = _rows_by_batch(
    np.concatenate([c[np.lexsort(keys_KxN[:, c])] for c in chunks]),
    shape.batch_size,
  )
  return order[rng.permutation(len(order))]


def evaluation_order(
  lengths_N: np.ndarray, shape: Shape, within_N: np.ndarray | None = None
) -> np.ndarray:
  """Every row once, by length: int64 (batches, batch_size), -1 fills the last one.

  Args:
    within_N: as of `training_order`.
  """
  keys_KxN = _sort_keys(lengths_N, shape, within_N)
  return _rows_by_batch(np.lexsort((lengths_N, *keys_KxN)), shape.batch_size)


def _sort_keys(
  lengths_N: np.ndarray, shape: Shape, within_N: np.ndarray | None
) -> np.ndarray:
  """Keys as of np.lexsort, the first of which comes last."""
  bucket_N = shape.bucket_of(lengths_N)
  within_N = np.zeros_like(bucket_N) if within_N is None else within_N
  return np.stack([within_N, bucket_N])


def _within(rows: Rows) -> np.ndarray | None:
  return rows.tokens.decoder_buckets(slice(None)) if isinstance(rows, Pairs) else None


def _rows_by_batch(rows_N: np.ndarray, batch_size: int) -> np.ndarray:
  steps = steps_per_epoch(len(rows_N), batch_size)
  order = np.full(steps * batch_size, -1, np.int64)
  order[: len(rows_N)] = rows_N
  return order.reshape(steps, batch_size)


def _length(tokens: Rows, shape: Shape, rows_B: np.ndarray) -> int:
  """The padded length of a batch of these rows."""
  lengths = tokens.lengths_N[rows_B[rows_B >= 0]]
  return shape.buckets[int(shape.bucket_of(lengths).max())]


def _assemble(tokens: Rows, shape: Shape, rows_B: np.ndarray) -> Batch:
  """A batch of these rows, at its own padded length."""
  return tokens.batch(rows_B, _length(tokens, shape, rows_B))


@dataclass(frozen=True)
class _Batches(Sequence[Batch]):
  """Batches by number, each made when it is asked for: grain reads ahead."""

  length: int
  make: Callable[[int], Batch]

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, number):
    return self.make(int(number))


def _rows_of(tokens: Rows, shape: Shape, seed: int) -> Callable[[int], np.ndarray]:
  """The numbers of the rows of a run's batches, by the batch's number."""
  order = functools.lru_cache(maxsize=2)(
    functools.partial(
      training_order, tokens.lengths_N, shape, seed, within_N=_within(tokens)
    )
  )

  def rows(number: int) -> np.ndarray:
    epoch, step = divmod(number, steps_per_epoch(len(tokens), shape.batch_size))
    return order(epoch)[step]

  return rows


def training(tokens: Rows, shape: Shape, *, seed: int) -> grain.DatasetIterator[Batch]:
  """Training batches without end, read ahead in a thread.

  Args:
    tokens: the full training split, the same in every process.
    shape: batch size and padded lengths.
    seed: seed of the order.

  Returns:
    An iterator over dicts as the rows' `batch` gives them, of `batch_size` rows, each
    example once an epoch. `get_state()` is its position, a small JSON-able dict; after
    `set_state(position)` the next batches are the very same.
  """
  _check(tokens, shape)
  if seed < 0:
    raise LoraxError(f"the seed is {seed}, and must not be negative")
  rows = _rows_of(tokens, shape, seed)
  return _read_ahead(tokens, shape, lambda i: _assemble(tokens, shape, rows(i)))


@dataclass(frozen=True)
class Cut:
  """Lengths and columns by which a run's batch in `Together` is cut to its own.

  Attributes:
    lengths: padded lengths, ascending, of which its column `LENGTH` has its own.
    columns: those whose second axis is cut to that length.
  """

  lengths: tuple[int, ...]
  columns: tuple[str, ...]


# A column of batches of `Together`, int32: the length to which a run's is padded alone.
LENGTH = "length"


class Together:
  """Training batches of several runs that differ in their seed at most, without end.

  Each array has a leading axis, over the runs: batch i of run n has the rows that
  `training` gives it with that seed, and all are padded to the longest of them. The
  runs may start at different times, and others may take their places (`arrange`).

  Attributes:
    cut: from a run's part of a batch to its batch alone.
  """

  def __init__(self, tokens: Rows, shape: Shape, *, seeds: Sequence[int]):
    """All start together: `seeds` has each run's."""
    _check(tokens, shape)
    self._tokens, self._shape = tokens, shape
    self._taken = 0
    first, last = (
      tokens.batch(np.array([-1]), n) for n in (shape.buckets[0], shape.buckets[-1])
    )
    varying = tuple(name for name in first if first[name].shape != last[name].shape)
    self.cut = Cut(shape.buckets, varying)
    self.arrange(seeds, [0] * len(seeds))

  def arrange(self, seeds: Sequence[int], starts: Sequence[int]) -> None:
    """Gives the places to these runs from the next batch on.

    Args:
      seeds: of the run in each place.
      starts: number of batches that were taken before each one's first.
    """
    self._seeds, self._starts = [*seeds], [*starts]
    runs = {seed: _rows_of(self._tokens, self._shape, seed) for seed in seeds}
    places = [*zip(seeds, starts, strict=True)]
    streams = [*dict.fromkeys(places)]  # Equal ones are made once.
    order = [streams.index(place) for place in places]

    def make(number: int) -> Batch:
      # In one batch, so that all of them have the same padded lengths.
      each = [runs[seed](number - start) for seed, start in streams]
      batch = _assemble(self._tokens, self._shape, np.concatenate(each))
      own = [_length(self._tokens, self._shape, rows_B) for rows_B in each]
      batch[LENGTH] = np.repeat(np.array(own, np.int32), self._shape.batch_size)
      return {
        name: x.reshape(len(streams), -1, *x.shape[1:])[order]
        for name, x in batch.items()
      }

    first = self._taken
    self._batches = _read_ahead(self._tokens, self._shape, lambda i: make(first + i))

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._taken += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position, JSON-able."""
    return {"taken": self._taken, "seeds": self._seeds, "starts": self._starts}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a position: the next batches are the very same."""
    self._taken = state["taken"]
    self.arrange(state["seeds"], state["starts"])


def _read_ahead(
  tokens: Rows, shape: Shape, make: Callable[[int], Batch]
) -> grain.DatasetIterator[Batch]:
  count = steps_per_epoch(len(tokens), shape.batch_size) * _ENDLESS
  source = grain.MapDataset.source(_Batches(count, make))
  read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  return iter(source.to_iter_dataset(read))


def evaluation(tokens: Rows, shape: Shape) -> Sequence[Batch]:
  """Evaluation batches: every row exactly once.

  The rows that fill up the last batch have weight 0 and index -1. `index` puts
  predictions back in order.
  """
  _check(tokens, shape)
  order = evaluation_order(tokens.lengths_N, shape, _within(tokens))
  return _Batches(len(order), lambda i: _assemble(tokens, shape, order[i]))


def _check(tokens: Rows, shape: Shape) -> None:
  if not len(tokens):
    raise LoraxError("there are no examples to make batches of")
  shape.bucket_of(tokens.lengths_N)
