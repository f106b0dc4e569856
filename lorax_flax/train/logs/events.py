"""TensorBoard's events of a run.

A file of events holds TFRecords, each a protocol buffer `Event`: see record_writer.h
and event.proto of TensorFlow. They are written here, since the libraries that write
them import PyTorch or TensorFlow where these are installed, which takes seconds.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from lorax_flax.files import atomic

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed.


class Events:
  """A file of events, which the first of them makes."""

  def __init__(self, folder: Path, step: int):
    """Resumes after `step`: drops later events, of a process that was killed."""
    self._folder, self._step = folder, step
    self._file: BinaryIO | None = None
    with atomic.naming(folder):
      folder.mkdir(exist_ok=True)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes values by name."""
    with atomic.naming(self._folder):
      if self._file is None:
        self._file = self._opened()
      records = [_event(step, 5, _scalar(n, value)) for n, value in values.items()]
      self._file.write(b"".join(records))
      self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      with atomic.naming(self._folder):
        self._file.close()

  def _opened(self) -> BinaryIO:
    # The step keeps two files of one second apart.
    place = f"{int(time.time()):010d}.{socket.gethostname()}.{self._step}"
    file = (self._folder / f"events.out.tfevents.{place}").open("wb")
    file.write(_event(0, 3, b"brain.Event:2"))
    if self._step:
      start = _varint(1 << 3) + _varint(1)  # SessionLog.status: START.
      file.write(_event(self._step + 1, 7, start))
    return file


def _event(step: int, field: int, content: bytes) -> bytes:
  """The record of an event, with one of its fields beside time (1) and step (2)."""
  when = _varint(1 << 3 | 1) + struct.pack("<d", time.time())
  event = when + _varint(2 << 3) + _varint(step) + _bytes(field, content)
  length = struct.pack("<Q", len(event))
  return length + _masked_crc(length) + event + _masked_crc(event)


def _scalar(name: str, value: float) -> bytes:
  """A `Summary` of one value: tag (1) and simple_value (2)."""
  number = _varint(2 << 3 | 5) + struct.pack("<f", value)
  return _bytes(1, _bytes(1, name.encode()) + number)


def _bytes(field: int, content: bytes) -> bytes:
  return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
  """A number as bytes of seven bits each, the lowest first."""
  found = []
  while value > 0x7F:
    found.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*found, value])


def _crc_of_byte(value: int) -> int:
  for _ in range(8):
    value = value >> 1 ^ _POLYNOMIAL * (value & 1)
  return value


_CRCS = tuple(map(_crc_of_byte, range(256)))


def _masked_crc(content: bytes) -> bytes:
  """CRC-32C, rotated and shifted as TFRecords have it."""
  crc = 0xFFFFFFFF
  for byte in content:
    crc = crc >> 8 ^ _CRCS[(crc ^ byte) & 0xFF]
  crc ^= 0xFFFFFFFF
  rotated = crc >> 15 | crc << 17 & 0xFFFFFFFF
  return struct.pack("<I", rotated + 0xA282EAD8 & 0xFFFFFFFF)
