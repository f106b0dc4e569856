"""Adapters of one base by name: in slots on the device, on the host, and on disk.

Each tier has room for a number of bytes, and gives up first what was used least
recently: a slot is then used again, and what leaves the host is on disk. Nothing is
compiled for an adapter; see `lx.many`.
"""

import itertools
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.many import AllSlots, Many
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.hub.adapters import native
from lorax_flax.methods import Adapter

# Reads an adapter from where it is kept.
Read = Callable[[], Adapter]


class SlotsInUse(LoraxError):
  """Every slot is in use by a request: wait for one to be released."""


class Adapters:
  """The adapters that a server has for its base. Not for several threads at once.

  Attributes:
    slots: of `many`, as its `apply` takes them; another object after each `acquire`.
  """

  def __init__(
    self,
    many: Many,
    params: Any,
    slots: AllSlots,
    *,
    host_bytes: int,
    folder: str | Path | None = None,
    disk_bytes: int = 0,
  ):
    """Slots without adapters.

    Args:
      many: of which `slots` are; its capacity bounds the device's tier.
      params: the base.
      host_bytes: the most that is kept in the host's memory.
      folder: for adapters that were given as arrays; None: they are dropped.
      disk_bytes: the most that is kept there.
    """
    self.slots = slots
    self._many, self._params = many, params
    self._host = _Tier(host_bytes)
    self._disk = _Tier(disk_bytes)
    self._folder = None if folder is None else Path(folder)
    self._numbers = itertools.count()
    # Each adapter that was added has a number of its own, so that one which is replaced
    # stays what it was for those that use it.
    self._current: dict[str, int] = {}
    self._sources: dict[int, Read] = {}
    # Slot to number, the least recently used first.
    self._on_device: OrderedDict[int, int | None] = OrderedDict.fromkeys(
      range(many.capacity)
    )
    self._uses: Counter[int] = Counter()

  @property
  def names(self) -> list[str]:
    """The adapters that `acquire` may be asked for, sorted."""
    return sorted(name for name, key in self._current.items() if self._has(key))

  def add(self, name: str, adapter: Adapter, read: Read | None = None) -> None:
    """Takes up an adapter, in place of one of that name.

    Args:
      read: reads it again once it has left the host. Without this function it is then
        written to `folder`.

    Raises:
      LoraxError: it does not fit the base or the slots.
    """
    self._many.fitted(self._params, self.slots, adapter)
    if name in self._current:
      self.remove(name)
    key = self._current[name] = next(self._numbers)
    if read is not None:
      self._sources[key] = read
    self._keep(key, jax.tree.map(np.asarray, adapter))

  def remove(self, name: str) -> None:
    """Forgets an adapter; requests that use it go on.

    Raises:
      LoraxError: there is none of that name.
    """
    key = self._key(name)
    del self._current[name]
    self._sources.pop(key, None)
    self._host.remove(key)
    if self._disk.remove(key):
      shutil.rmtree(self._path(key))
    self._vacate()

  def acquire(self, name: str) -> int:
    """The slot of an adapter, which keeps it until `release`.

    Raises:
      SlotsInUse: it is in none, and each is in use.
      LoraxError: there is no such adapter, or none any more.
    """
    key = self._key(name)
    slot = next((s for s, held in self._on_device.items() if held == key), None)
    if slot is None:
      slot = self._free_slot()
      adapter = self._loaded(key)
      self.slots = self._many.put(self._params, self.slots, slot, adapter)
      self._on_device[slot] = key
    self._on_device.move_to_end(slot)
    self._uses[slot] += 1
    return slot

  def release(self, slot: int) -> None:
    """Ends one use of a slot that `acquire` gave."""
    if not self._uses[slot]:
      raise LoraxError(f"slot {slot} is not in use")
    self._uses[slot] -= 1
    self._vacate()

  def identity(self, slot: int) -> int | None:
    """Number of the adapter in a slot; one that takes another's name has another."""
    return self._on_device[slot]

  def _vacate(self) -> None:
    """Makes the slots of forgotten adapters that nobody uses the next to be given."""
    for slot, key in [*self._on_device.items()]:
      if key not in (None, *self._current.values()) and not self._uses[slot]:
        self._on_device[slot] = None
        self._on_device.move_to_end(slot, last=False)

  def _key(self, name: str) -> int:
    if name not in self._current or not self._has(self._current[name]):
      raise LoraxError(unknown("adapter", name, self.names))
    return self._current[name]

  def _has(self, key: int) -> bool:
    tiers = self._sources, self._host, self._disk
    return any(key in tier for tier in tiers) or key in self._on_device.values()

  def _free_slot(self) -> int:
    for slot in self._on_device:
      if not self._uses[slot]:
        return slot
    raise SlotsInUse(f"all {len(self._on_device)} slots are in use: wait for a release")

  def _loaded(self, key: int) -> Adapter:
    """An adapter, on the host from now on."""
    if key in self._host:
      return self._host.used(key)
    if key in self._sources:
      adapter = self._sources[key]()
    else:
      path = self._disk.used(key)
      adapter = native.read_adapter(path, self._params).adapter
    adapter = jax.tree.map(np.asarray, adapter)
    self._keep(key, adapter)
    return adapter

  def _keep(self, key: int, adapter: Adapter) -> None:
    """Puts an adapter on the host; what has no room there goes to disk."""
    size = sum(x.nbytes for x in jax.tree.leaves(adapter))
    for gone, left in self._host.add(key, adapter, size):
      if self._folder is None or gone in self._sources or gone in self._disk:
        continue
      path = self._path(gone)
      native.write_adapter(path, native.Saved(left, LoraConfig()))
      size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
      for _, old in self._disk.add(gone, path, size):
        shutil.rmtree(old)

  def _path(self, key: int) -> Path:
    assert self._folder is not None  # Otherwise nothing is on disk.
    return self._folder / str(key)


class _Tier:
  """Values by key, the least recently used first, with room for some bytes."""

  def __init__(self, room: int):
    self._room = room
    self._held: OrderedDict[int, tuple[Any, int]] = OrderedDict()

  def __contains__(self, key: int) -> bool:
    return key in self._held

  def used(self, key: int) -> Any:
    """The value, as the one that was used last."""
    self._held.move_to_end(key)
    return self._held[key][0]

  def remove(self, key: int) -> bool:
    """Takes a value out; False where there is none."""
    return self._held.pop(key, None) is not None

  def add(self, key: int, value: Any, size: int) -> list[tuple[int, Any]]:
    """Puts a value in, and returns those for which there is no room any more."""
    self._held[key] = value, size
    gone = []
    while sum(size for _, size in self._held.values()) > self._room:
      old, (left, _) = self._held.popitem(last=False)
      gone.append((old, left))
    return gone
