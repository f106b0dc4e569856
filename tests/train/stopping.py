"""Batches that end a run at some step, as a failure of the process would."""


class Stopped(Exception):
  pass


class Stopping:
  """Batches that end the process's work at some step, like a failure would."""

  def __init__(self, batches, after: int):
    self._batches, self._left = batches, after

  def __next__(self):
    if not self._left:
      raise Stopped
    self._left -= 1
    return next(self._batches)

  def __getattr__(self, name):
    return getattr(self._batches, name)
