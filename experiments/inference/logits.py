"""Logits of many rows: batched by length, computed, and given back in order."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_flax as lx
from experiments.inference.lines import Inputs
from lorax_flax.data import pipeline
from lorax_flax.data.tokens import Batch, Tokens
from lorax_flax.methods import Adapter
from lorax_flax.models.registry import Loaded

# Each length is compiled once; more lengths pad less.
_BUCKETS = 4
# So many batches are sorted by length, and kept until all of them are there.
_WINDOW = 50
# Of a batch's logits, and of those that are kept: a vocabulary is wide.
_MOST_BYTES = 1 << 30
_NO_INPUTS = ("weights", "index")


def logits(
  rows: Inputs, loaded: Loaded, batch_size: int, *, every: bool, rest: Adapter | None
) -> Iterator[list[np.ndarray | None]]:
  """Each row's logits, in the rows' order.

  Args:
    rows: what the model takes.
    loaded: the model.
    batch_size: of rows computed at once; fewer where their logits are too large.
    every: of a language model, the logits at every position.
    rest: as of `merged.Merged`.

  Yields:
    The logits of a row, float32: one array (C,), a language model's those at the last
    token; or with `every` one array for each position, and None where its attention
    mask is 0.
  """
  buckets = _buckets(rows, loaded)
  size, window = _sizes(rows, loaded, buckets[-1], batch_size, every)
  apply, shape = _apply(loaded, rest), pipeline.Shape(size, buckets)
  for start in range(0, len(rows), window):
    part = rows.part(start, min(start + window, len(rows)))
    lengths_N = _positions(part)
    found: list[list[np.ndarray | None]] = [[]] * len(part)
    for batch in pipeline.evaluation(part, shape):
      inputs = {name: x for name, x in batch.items() if name not in _NO_INPUTS}
      seen_BxT = None if loaded.family.has_labels else _seen(part, batch)
      last_B = None if seen_BxT is None or every else _last(seen_BxT)
      computed = np.asarray(apply(loaded.params, inputs, last_B), np.float32)
      for row in np.flatnonzero(batch["index"] >= 0):
        number = batch["index"][row]
        found[number] = [computed[row]]
        if every and seen_BxT is not None:
          pairs = zip(computed[row], seen_BxT[row], strict=True)
          each = [x_V.copy() if seen else None for x_V, seen in pairs]
          found[number] = each[: lengths_N[number]]
    yield from found


def _apply(
  loaded: Loaded, rest: Adapter | None
) -> Callable[[Any, Batch, np.ndarray | None], jax.Array]:
  def forward(params, inputs):
    return loaded.module.apply({"params": params}, **inputs, deterministic=True)

  adapted = lx.adapt(forward, lx.LoraConfig())

  @jax.jit
  def apply(params, inputs, last_B):
    found: Any = (
      forward(params, inputs) if rest is None else adapted.apply(params, rest, inputs)
    )
    if last_B is None:
      return found
    return jnp.take_along_axis(found, last_B[:, None, None], axis=1)[:, 0]

  return apply


def _buckets(rows: Inputs, loaded: Loaded) -> tuple[int, ...]:
  if not isinstance(rows, Tokens):
    return (1,)
  chosen = pipeline.choose_buckets(rows.lengths_N, _BUCKETS)
  return tuple(sorted({min(length, loaded.max_length) for length in chosen}))


def _sizes(
  rows: Inputs, loaded: Loaded, longest: int, batch_size: int, every: bool
) -> tuple[int, int]:
  """Rows of a batch, and rows of which the logits are kept at once."""
  size = min(batch_size, len(rows))
  if loaded.family.has_labels:
    return size, size * _WINDOW
  if isinstance(rows, Tokens) and rows.decoder is not None:
    longest = rows.decoder_lengths[-1]
  position_bytes = 4 * loaded.config.vocab_size
  size = max(1, min(size, _MOST_BYTES // (position_bytes * longest)))
  kept = position_bytes * (longest if every else 1)
  return size, size * max(1, min(_WINDOW, _MOST_BYTES // (size * kept)))


def _positions(rows: Inputs) -> np.ndarray:
  """Number of positions that each row has logits for."""
  if isinstance(rows, Tokens) and rows.decoder is not None:
    return rows.decoder.lengths_N
  return rows.lengths_N


def _seen(rows: Inputs, batch: Batch) -> np.ndarray:
  """Mask of the positions of a language model's logits that are tokens: bool (B, T)."""
  if "decoder_input_ids" not in batch:
    return batch["attention_mask"] != 0
  places_T = np.arange(batch["decoder_input_ids"].shape[1])
  return places_T[None, :] < _positions(rows)[batch["index"]][:, None]


def _last(seen_BxT: np.ndarray) -> np.ndarray:
  """The last position of each row that is a token's; of none, the first."""
  places_T = np.arange(seen_BxT.shape[1], dtype=np.int32)
  return np.max(np.where(seen_BxT, places_T[None, :], 0), axis=1)
