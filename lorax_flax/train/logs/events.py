"""TensorBoard's events of a run."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.files import atomic


class Events:
  """A file of events, which the first of them makes.

  tensorboardX is imported then: it imports PyTorch where that is installed, and the
  first step need not wait for it.
  """

  def __init__(self, folder: Path, step: int):
    """Resumes after `step`: drops later events, of a process that was killed."""
    self._folder, self._step = folder, step
    self._writer: Any = None
    with atomic.naming(folder):
      folder.mkdir(exist_ok=True)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes values by name."""
    from tensorboardX import summary

    with atomic.naming(self._folder):
      if self._writer is None:
        self._open()
      for name, value in values.items():
        self._event(step, summary=summary.scalar(name, value))
      self._writer.flush()

  def close(self) -> None:
    if self._writer is not None:
      with atomic.naming(self._folder):
        self._writer.close()

  def _open(self) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import SessionLog

    # The suffix keeps two files of one second apart.
    self._writer = EventsWriter(str(self._folder / "events"), f".{self._step}")
    if self._step:
      start = SessionLog(status=SessionLog.START)
      self._event(self._step + 1, session_log=start)

  def _event(self, step: int, **what: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
