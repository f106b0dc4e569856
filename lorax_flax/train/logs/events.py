"""TensorBoard's events of a run."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.files import atomic

_VERSION = "brain.Event:2"


class Events:
  """A file of events, which the first of them makes.

  TensorBoard's writer of records is imported then: the first step need not wait for it.
  """

  def __init__(self, folder: Path, step: int):
    """Resumes after `step`: drops later events, of a process that was killed."""
    self._folder, self._step = folder, step
    self._file: Any = None
    with atomic.naming(folder):
      folder.mkdir(exist_ok=True)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes values by name."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with atomic.naming(self._folder):
      if self._file is None:
        self._open()
      for name, value in values.items():
        scalar = Summary.Value(tag=name, simple_value=value)
        self._event(step=step, summary=Summary(value=[scalar]))
      self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      with atomic.naming(self._folder):
        self._file.close()

  def _open(self) -> None:
    from tensorboard.compat.proto.event_pb2 import SessionLog

    # The step keeps two files of one second apart.
    place = f"{int(time.time()):010d}.{socket.gethostname()}.{self._step}"
    self._file = (self._folder / f"events.out.tfevents.{place}").open("wb")
    self._event(file_version=_VERSION)
    if self._step:
      start = SessionLog(status=SessionLog.START)
      self._event(step=self._step + 1, session_log=start)

  def _event(self, **fields: Any) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    event = Event(wall_time=time.time(), **fields)
    RecordWriter(self._file).write(event.SerializeToString())
