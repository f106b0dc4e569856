"""Encoded rows of a file gathered: cut to length, and checked that each is of use."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorax_flax.data.language.encoding import Encoded, Outcomes
from lorax_flax.data.own.table import Bad, none_of_use
from lorax_flax.data.sequences import IGNORED, Sequences
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.errors import LoraxError


@dataclass(frozen=True)
class Gathered:
  """The rows of a file.

  Attributes:
    file: that they were read from.
    rows: those that are of use.
    lengths_N: number of tokens of each before it was cut.
    skipped: those that were left out.
  """

  file: Path
  rows: Sequences
  lengths_N: np.ndarray
  skipped: tuple[Bad, ...]


def gather(
  file: Path,
  outcomes: Outcomes,
  *,
  max_length: int,
  vocab_size: int,
  pad_id: int,
  skip: bool,
) -> Gathered:
  """Gathers the rows of a file.

  Args:
    max_length: longer rows are truncated, at their end.
    vocab_size: upper bound of ids, exclusive.
    pad_id: the id of padding.
    skip: leaves out a row that can't be used, and counts it.

  Raises:
    LoraxError: without `skip`, the first row that can't be used, named; no row is left.
  """
  ids: list[np.ndarray] = []
  labels: list[np.ndarray] = []
  lengths: list[int] = []
  skipped: list[Bad] = []
  for place, made in outcomes:
    problem = _problem(made, max_length, vocab_size)
    if isinstance(made, LoraxError) or problem:
      if not skip:
        raise LoraxError(f"{file}: {place}: {problem}")
      skipped.append(Bad(place, problem))
      continue
    ids_T, learnt_T = made
    lengths.append(len(ids_T))
    ids.append(ids_T[:max_length])
    labels.append(np.where(learnt_T, ids_T, np.int32(IGNORED))[:max_length])
  if not ids:
    raise LoraxError(none_of_use(file, skipped))
  ids_S, offsets = ragged(ids)
  rows = Sequences(Tokens(ids_S, offsets, pad_id), ragged(labels)[0])
  return Gathered(file, rows, np.asarray(lengths), tuple(skipped))


def _problem(made: Encoded | LoraxError, max_length: int, vocab_size: int) -> str:
  """The reason why a row is of no use; "" where it is of use."""
  if isinstance(made, LoraxError):
    return str(made)
  ids_T, learnt_T = made
  # JAX would clamp an index that is out of bounds.
  wrong = ids_T[(ids_T < 0) | (ids_T >= vocab_size)]
  if len(wrong):
    return f"input_ids has {wrong[0]}, and goes from 0 to {vocab_size - 1}"
  if learnt_T[1:max_length].any():
    return ""
  if learnt_T[max_length:].any():
    return (
      "no token is predicted: those that are learnt are all cut off, behind its first "
      f"{max_length} tokens (data.max_length)"
    )
  return "no token is predicted: none that is learnt has one before it"
