"""Wall time by activity."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Stopwatch:
  """A stopwatch of one activity at a time; an inner one interrupts the outer one."""

  def __init__(self, activity: str, seconds: Mapping[str, float] | None = None):
    """Starts `activity`; adds to the `seconds` of an earlier process."""
    self._seconds = dict(seconds or {})
    self._activities = [activity]
    self._since = time.monotonic()

  @contextlib.contextmanager
  def on(self, activity: str) -> Iterator[None]:
    """Adds the time of the block to `activity`."""
    self._book()
    self._activities.append(activity)
    try:
      yield
    finally:
      self._book()
      self._activities.pop()

  def seconds(self) -> dict[str, float]:
    """Seconds so far, by activity."""
    self._book()
    return dict(self._seconds)

  def _book(self) -> None:
    now = time.monotonic()
    activity = self._activities[-1]
    self._seconds[activity] = self._seconds.get(activity, 0.0) + now - self._since
    self._since = now
