"""Parts of a leaf: what of which stored tensor lies in a block."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lorax_flax.hub.checkpoints.entries import Site

# The first and the last place plus one on each axis of a leaf.
Block = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Block:
  """All of a leaf."""
  return tuple((0, n) for n in shape)


def shape_of(block: Block) -> tuple[int, ...]:
  return tuple(stop - start for start, stop in block)


def overlap(
  site: Site, shape: Sequence[int], block: Block
) -> tuple[tuple[Any, ...], tuple[slice, ...]] | None:
  """What a stored tensor gives to a block of our leaf of this shape; None: nothing.

  Returns:
    The index in the block, and the index in the stored tensor; the latter's array, as
    `Entry.to_ours` turns it, goes into the former.
  """
  stack, inner = block[: len(site.index)], block[len(site.index) :]
  if not all(a <= i < z for i, (a, z) in zip(site.index, stack, strict=True)):
    return None
  there: list[Any] = [i - a for i, (a, _) in zip(site.index, stack, strict=True)]
  ours = [slice(a, z) for a, z in inner]
  there += [slice(0, z - a) for a, z in inner]
  k, n = site.entry.piece
  if n > 1:
    width = shape[-1] // n
    (a, z), offset = inner[-1], k * width
    low, high = max(a, offset), min(z, offset + width)
    if low >= high:
      return None
    there[-1] = slice(low - a, high - a)
    ours[-1] = slice(low - offset, high - offset)
  axes = site.entry.axes or range(len(ours))
  stored = sorted(zip(axes, ours, strict=True), key=lambda pair: pair[0])
  return tuple(there), tuple(cut for _, cut in stored)


def in_shards(
  shape: Sequence[int],
  sharding: jax.sharding.Sharding,
  read: Callable[[Block], np.ndarray],
) -> jax.Array:
  """An array of which only the parts that lie on this process's devices are read.

  Each part is read once and goes to its devices before the next one is read.
  """
  shape = tuple(shape)
  devices: dict[Block, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    pairs = zip(index or (), shape, strict=True)
    block = tuple(cut.indices(n)[:2] for cut, n in pairs)
    devices.setdefault(block, []).append(device)
  parts = []
  for block, owners in devices.items():
    part = read(block)
    parts += [jax.device_put(part, device) for device in owners]
    # Copying goes on in the background, and would hold on to what was read.
    jax.block_until_ready(parts[-len(owners) :])
  return jax.make_array_from_single_device_arrays(
    shape, sharding, parts, dtype=parts[0].dtype
  )
