"""Checkpoints: the best and the last, written beside the training and atomically."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket

PyTree = Any


@dataclass(frozen=True)
class Progress:
  """What a checkpoint holds besides the arrays; JSON-able.

  Attributes:
    position: of the data iterator.
    pending: sums and counts of the metrics since the last line that was logged.
    evaluations: each a dict of step, epoch, metrics and examples, oldest first.
    best: index of the best of them, None before the first.
    seconds: of wall time by what it was spent on, over all processes of the run.
    tokens: trained on so far.
    skipped: steps that changed nothing, since they were not finite.
    failed: where the run ended before its time, and why; None: it did not.
  """

  position: dict[str, Any]
  pending: dict[str, tuple[float, float]] = field(default_factory=dict)
  evaluations: list[dict[str, Any]] = field(default_factory=list)
  best: int | None = None
  seconds: dict[str, float] = field(default_factory=dict)
  tokens: int = 0
  skipped: int = 0
  failed: dict[str, Any] | None = None

  @property
  def best_step(self) -> int | None:
    """The step of the best evaluation."""
    return None if self.best is None else self.evaluations[self.best]["step"]


@dataclass(frozen=True)
class ProgressOfSeveral:
  """The same of several runs that take their steps together."""

  runs: list[Progress]

  # Each run's best lies in the state itself: only the last checkpoint is kept.
  best_step: ClassVar[int | None] = None

  @staticmethod
  def from_json(runs: list[dict[str, Any]]) -> "ProgressOfSeveral":
    return ProgressOfSeveral([Progress(**run) for run in runs])


@dataclass
class _BestAndLast:
  """Orbax asks it what to keep; `best` is set before each save."""

  best: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    last = len(checkpoints) - 1
    return [i == last or c.step == self.best for i, c in enumerate(checkpoints)]


class Checkpoints:
  """The checkpoints of one run in a folder.

  A checkpoint counts only once it is complete, and an older one is deleted only after
  that: a process may be killed at any moment.
  """

  def __init__(self, folder: Path, progress: Callable[..., Any] = Progress):
    """`progress`: makes it from a checkpoint's JSON."""
    self._folder, self._progress = folder, progress
    self._policy = _BestAndLast()
    with bucket.reaching(folder):
      self._manager = ocp.CheckpointManager(
        folder if bucket.holds(folder) else folder.absolute(),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._policy,
          cleanup_tmp_directories=True,
          enable_async_checkpointing=True,
          async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
        ),
      )

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(
    self, step: int, state: PyTree, progress: Progress | ProgressOfSeveral
  ) -> None:
    """Starts to write in the background; waits for the save before, if need be.

    Raises:
      LoraxError: this one or the one before can't be written: a full disk.
    """
    self._policy.best = progress.best_step
    # The writer reads the buffers while the next step, which is given them to reuse,
    # is running already.
    state = jax.tree.map(jnp.copy, state)
    with self._explained():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          progress=ocp.args.JsonSave(asdict(progress)),
        ),
      )

  def restore(self, step: int, like: PyTree) -> tuple[PyTree, Any]:
    """The checkpoint of a step, with `like`'s structure, dtypes and shardings."""
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    with bucket.reaching(self._folder):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
        ),
      )
    return restored.state, self._progress(**restored.progress)

  def wait(self) -> None:
    """Until all that was saved is complete."""
    with self._explained():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    with self._explained():
      self._manager.close()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Says why a checkpoint can't be written, and what there is all the same."""
    try:
      yield
    except Exception as error:  # Of a bucket there are others than OSError.
      code = _refusal(error)
      if code is not None:
        why = os.strerror(code)
      elif bucket.holds(self._folder):
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
      else:
        raise
      kept = self._kept()
      raise LoraxError(
        f"can't write a checkpoint to {self._folder}: {why}. "
        + (f"The checkpoint of step {kept} is kept" if kept else "There is none yet")
      ) from error

  def _kept(self) -> int | None:
    """The newest complete checkpoint.

    Orbax would ask the other processes, who may be waiting for this one.
    """
    with bucket.reaching(self._folder):
      steps = [entry for entry in self._folder.iterdir() if entry.name.isdecimal()]
      if bucket.holds(self._folder):  # There its name does not say that it is complete.
        steps = [entry for entry in steps if (entry / _COMMITTED).exists()]
    return max((int(entry.name) for entry in steps), default=None)


# The object with which Orbax completes a checkpoint in a bucket.
_COMMITTED = "commit_success.txt"


def _meet(*, key: str, timeout_ms: int) -> None:
  """Orbax's barrier, but for a thread that has failed.

  Orbax waits for the others then too, for twenty minutes, and so would they: for what
  this one did not write. Its error goes on instead.
  """
  error = sys.exc_info()[1]
  if error is not None:
    raise error
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


# How the library that writes arrays reports the system's refusal.
_CODE = re.compile(r"os_error_code='(\d+)'")


def _refusal(error: BaseException | None) -> int | None:
  """The number of the system's error that this one comes of; None: of none."""
  while error is not None:
    if isinstance(error, OSError) and error.errno is not None:
      return error.errno
    if found := _CODE.search(str(error)):
      return int(found[1])
    error = error.__cause__ or error.__context__
  return None
