"""Writers of metrics and answers: lines of JSON, and events."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_flax.files import atomic, bucket, strict_json
from lorax_flax.files import workdir as files
from lorax_flax.train.logs.events import Events


class Record:
  """Lines of metrics.

  metrics.jsonl, and samples.jsonl where prompts are answered, hold nothing that depends
  on the clock: a run that was killed and resumed has the very files of one that was
  not. Speed and memory go to TensorBoard alone.

  In a bucket, where nothing can be appended to, all are complete after each `flush`.
  """

  def __init__(self, workdir: Path, step: int):
    """Resumes after `step`: drops later lines, of a process that was killed."""
    self.lines: list[dict[str, Any]] = lines_until(workdir / files.METRICS, step)
    # Those of step 0 are written anew where nothing was saved.
    samples = workdir / files.SAMPLES
    self.samples = lines_until(samples, step) if step else []
    self._mirror = bucket.Mirror(workdir) if bucket.holds(workdir) else None
    if self._mirror is not None:
      workdir = self._mirror.folder
    self._file = workdir / files.METRICS
    files.write_text(self._file, "".join(map(_dump, self.lines)))
    self._samples = workdir / files.SAMPLES
    self._events = Events(workdir / files.TENSORBOARD, step)
    with atomic.naming(self._file):
      self._out = self._file.open("a", encoding="utf-8")

  def write(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
    """Writes a line: the step, the epochs that are done, values such as train/loss."""
    line = {"step": step, "epoch": epoch, **values}
    self.lines.append(line)
    with atomic.naming(self._file):
      self._out.write(_dump(line))
      self._out.flush()
    self.events(step, values)

  def answered(self, lines: Sequence[dict[str, Any]]) -> None:
    """Writes lines of answers: prompts, and the model's texts after them."""
    self.samples += lines
    files.write_text(self._samples, "".join(map(_dump, self.samples)))

  def events(self, step: int, values: Mapping[str, float]) -> None:
    """Writes values to TensorBoard alone."""
    self._events.write(step, values)

  def flush(self) -> None:
    """Waits until all lines would survive the end of this machine."""
    if self._mirror is not None:
      self._mirror.send()

  def close(self) -> None:
    with atomic.naming(self._file):
      self._out.close()
    self._events.close()
    if self._mirror is not None:
      with contextlib.closing(self._mirror):
        self.flush()


class SilentRecord:
  """Writer of the processes after the first, whose lines would be the same."""

  lines: Sequence[dict[str, Any]] = ()
  samples: Sequence[dict[str, Any]] = ()

  def _nothing(self, *values: Any) -> None:
    """Does nothing."""

  write = answered = events = flush = close = _nothing


def _dump(line: Mapping[str, Any]) -> str:
  return strict_json.dump(line) + "\n"


def lines_until(file: Path, step: float = math.inf) -> list[dict[str, Any]]:
  """The lines up to a step; the last one may have been cut off by a kill."""
  lines: list[dict[str, Any]] = []
  with bucket.reaching(file):
    if not file.exists():
      return lines
    content = file.read_text("utf-8")
  for text in content.splitlines():
    try:
      line = json.loads(text)
    except ValueError:
      break
    if line["step"] > step:
      break
    lines.append(line)
  return lines
