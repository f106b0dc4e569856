"""Blocks of leaves, and the parts of stored tensors that they hold."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lorax_flax.hub.checkpoints.entries import Site

# (start, stop) on each axis of a leaf.
Block = tuple[tuple[int, int], ...]


def full(shape: Sequence[int]) -> Block:
  """The block of a full leaf."""
  return tuple((0, n) for n in shape)


def shape_of(block: Block) -> tuple[int, ...]:
  return tuple(stop - start for start, stop in block)


def overlap(
  site: Site, shape: Sequence[int], block: Block
) -> tuple[tuple[Any, ...], tuple[slice, ...]] | None:
  """The part of a stored tensor that a block of our leaf holds; None: no part.

  Args:
    shape: of the leaf.

  Returns:
    The index in the block, and the index in the stored tensor; the latter's array, as
    `Entry.form` transposes it, goes into the former.
  """
  stack, inner = block[: len(site.index)], block[len(site.index) :]
  if not all(a <= i < z for i, (a, z) in zip(site.index, stack, strict=True)):
    return None
  index: list[Any] = [i - a for i, (a, _) in zip(site.index, stack, strict=True)]
  ours = [slice(a, z) for a, z in inner]
  index += [slice(0, z - a) for a, z in inner]
  k, n = site.entry.piece
  if n > 1:
    width = shape[-1] // n
    (a, z), offset = inner[-1], k * width
    low, high = max(a, offset), min(z, offset + width)
    if low >= high:
      return None
    index[-1] = slice(low - a, high - a)
    ours[-1] = slice(low - offset, high - offset)
  axes = site.entry.axes or range(len(ours))
  stored = sorted(zip(axes, ours, strict=True), key=lambda pair: pair[0])
  return tuple(index), tuple(cut for _, cut in stored)


def make_array(
  shape: Sequence[int],
  sharding: jax.sharding.Sharding,
  read: Callable[[Block], np.ndarray],
) -> jax.Array:
  """A sharded array, of which only the shards of this process's devices are read.

  Each shard is read once and goes to its devices before the next one is read.
  """
  shape = tuple(shape)
  devices: dict[Block, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    pairs = zip(index or (), shape, strict=True)
    block = tuple(cut.indices(n)[:2] for cut, n in pairs)
    devices.setdefault(block, []).append(device)
  shards = []
  for block, owners in devices.items():
    shard = read(block)
    shards += [jax.device_put(shard, device) for device in owners]
    # The copy is asynchronous, and would keep what was read in memory.
    jax.block_until_ready(shards[-len(owners) :])
  return jax.make_array_from_single_device_arrays(
    shape, sharding, shards, dtype=shards[0].dtype
  )
