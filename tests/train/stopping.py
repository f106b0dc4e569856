"""Batches that end a run at some step, as a failure of the process would."""

import pytest

from experiments import run
from tests.train import toy


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


def interrupt(settings, workdir, after: int) -> None:
  """A run of the command that ends at some step."""
  prepare = run.prepare
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      run,
      "prepare",
      lambda runs: toy.with_batches(prepare(runs), lambda x: Stopping(x, after)),
    )
    with pytest.raises(Stopped):
      run.run(settings, workdir)
