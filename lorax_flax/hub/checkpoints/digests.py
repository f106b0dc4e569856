"""Digests of a checkpoint's weights, by their numbers as the reader gives them.

The division into files, the order in them and the prefixes of keys don't matter; a GGUF
file's floats have the digests of the safetensors that they were made of.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from lorax_flax.hub.checkpoints.load import Found
from lorax_flax.hub.files.safetensors import Index, Reader

# A weight is read in blocks of rows; its sample is so many of them.
_BLOCK_BYTES, _SAMPLED = 64 << 10, 16
_THREADS = 8


def full(found: Found) -> dict[str, str]:
  """SHA-256 of every number of each weight, by bare key."""
  return _digests(found, None)


def sampled(found: Found) -> dict[str, str]:
  """SHA-256 of blocks at equal distances of each weight, at most 1 MiB in all.

  A weight of up to 1 MiB is read in full. In a larger one a change that falls between
  the blocks is not seen.
  """
  return _digests(found, _SAMPLED)


def kinds(found: Found) -> dict[str, dict[str, Any]]:
  """The "dtype" (or format of blocks) and "shape" of each weight, by bare key."""
  return {
    bare: {
      "dtype": found.reader.blocks(key) or str(found.reader.dtype(key)),
      "shape": list(found.reader.shape(key)),
    }
    for bare, key in _weights(found).items()
  }


def _weights(found: Found) -> dict[str, str]:
  """The stored key of each weight, buffers and other tasks' heads left out."""
  return {bare: k for bare, k in found.keys.items() if bare in found.keymap.sites}


def _digests(found: Found, most: int | None) -> dict[str, str]:
  """SHA-256 of at most so many blocks of each weight; None: of all."""
  keys = _weights(found)
  one = functools.partial(_digest, found.reader, most=most)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(keys, pool.map(one, keys.values()), strict=True))


def _digest(reader: Reader, key: str, most: int | None) -> str:
  blocks = _blocks(reader.shape(key), reader.dtype(key).itemsize)
  step = 1 if most is None else -(-len(blocks) // most)
  digest = hashlib.sha256()
  for block in blocks[::step]:
    digest.update(reader.part(key, block).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _blocks(shape: Sequence[int], itemsize: int) -> list[Index]:
  """The indices of a tensor's blocks, each of consecutive rows of one matrix."""
  if not shape:
    return [()]
  axis = max(0, len(shape) - 2)
  inner = (slice(None),) * (len(shape) - axis - 1)
  row = math.prod(shape[axis + 1 :]) * itemsize
  rows = max(1, _BLOCK_BYTES // max(1, row))
  matrices = itertools.product(*map(range, shape[:axis]))
  starts = range(0, shape[axis], rows)
  return [
    (*(slice(i, i + 1) for i in at), slice(start, start + rows), *inner)
    for at, start in itertools.product(matrices, starts)
  ]
