"""A bounded queue of which each share gets its turn."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class Waiting(Generic[_Item]):
  """Items that wait, first in first out within a share, and the shares in turns."""

  def __init__(self, most: int):
    """Starts empty; it holds at most `most` items."""
    self.most = most
    self._shares: OrderedDict[Hashable, deque[_Item]] = OrderedDict()

  def __len__(self) -> int:
    return sum(map(len, self._shares.values()))

  def __iter__(self) -> Iterator[_Item]:
    return (item for share in self._shares.values() for item in share)

  @property
  def full(self) -> bool:
    """True where there is no room for another item."""
    return len(self) >= self.most

  def put(self, share: Hashable, item: _Item) -> None:
    """Adds an item; that there is room is the caller's to check."""
    self._shares.setdefault(share, deque()).append(item)

  def take(self) -> _Item | None:
    """The next item of the share whose turn it is; None where nothing waits."""
    if not self._shares:
      return None
    share, items = self._shares.popitem(last=False)
    item = items.popleft()
    if items:
      self._shares[share] = items
    return item

  def drop(self, over: Callable[[_Item], bool]) -> None:
    """Leaves out the items that are over."""
    for share, items in list(self._shares.items()):
      kept = deque(item for item in items if not over(item))
      if kept:
        self._shares[share] = kept
      else:
        del self._shares[share]
