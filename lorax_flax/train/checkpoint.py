"""Checkpoints: the best and the last, written beside the training and atomically."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lorax_flax.errors import LoraxError
from lorax_flax.files import bucket

PyTree = Any


@dataclass(frozen=True)
class Progress:
  """The part of a checkpoint besides the arrays, for one run; JSON-able.

  Attributes:
    position: of the data iterator.
    pending: sums and counts of the metrics since the last line that was logged.
    evaluations: each a dict of step, epoch, metrics and examples, oldest first; the
      best one's report too, where there is one.
    best: index of the best of them, None before the first.
    seconds: of wall time by what it was spent on, over all processes of the run.
    tokens: number of units so far, of whatever unit the task counts in.
    skipped: number of steps that changed nothing, since they were not finite.
    failed: step and reason of a run that diverged, else None.
    place: of the program, in which it trains; None for a run that waits or is over.
    start: number of steps of the loop before its first; None for a run that waits.
    seconds_before: those of `seconds` that passed before its first step.
    scores: [step, score] of each time that it was judged, oldest first.
    pruned: step and reason of a run that was stopped early, else None.
  """

  position: dict[str, Any]
  pending: dict[str, tuple[float, float]] = field(default_factory=dict)
  evaluations: list[dict[str, Any]] = field(default_factory=list)
  best: int | None = None
  seconds: dict[str, float] = field(default_factory=dict)
  tokens: int = 0
  skipped: int = 0
  failed: dict[str, Any] | None = None
  place: int | None = 0
  start: int | None = 0
  seconds_before: dict[str, float] = field(default_factory=dict)
  scores: list[tuple[int, float]] = field(default_factory=list)
  pruned: dict[str, Any] | None = None

  @property
  def best_step(self) -> int | None:
    """The step of the best evaluation."""
    return None if self.best is None else self.evaluations[self.best]["step"]


@dataclass
class _BestAndLast:
  """Orbax's rule of what to keep; `best` is set before each save."""

  best: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    last = len(checkpoints) - 1
    return [i == last or c.step == self.best for i, c in enumerate(checkpoints)]


class Checkpoints:
  """The checkpoints of a run, or of several that train together, in a folder.

  A checkpoint counts only once it is complete, and an older one is deleted only after
  that: a process may be killed at any moment.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._policy = _BestAndLast()
    with bucket.reaching(folder):
      self._manager = ocp.CheckpointManager(
        folder if bucket.holds(folder) else folder.absolute(),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._policy,
          cleanup_tmp_directories=True,
          enable_async_checkpointing=True,
          async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
        ),
      )

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: PyTree, progress: Sequence[Progress]) -> None:
    """Starts to write in the background; waits for the save before, if need be.

    Args:
      progress: of each run. The best checkpoint of a single run is kept; of several,
        whose best are at different steps, the state itself has to hold them.

    Raises:
      LoraxError: this one or the one before can't be written: a full disk.
    """
    runs = [asdict(run) for run in progress]
    alone = len(progress) == 1
    self._policy.best = progress[0].best_step if alone else None
    # The writer reads the buffers while the next step, to which they are donated, is
    # running already.
    state = jax.tree.map(jnp.copy, state)
    with self._explained():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          progress=ocp.args.JsonSave(runs[0] if alone else {"runs": runs}),
        ),
      )

  def progress(self, step: int) -> list[Progress]:
    """Each run's progress at a step."""
    restored = self._restore(step, progress=ocp.args.JsonRestore()).progress
    return [Progress(**run) for run in restored.get("runs", [restored])]

  def restore(self, step: int, like: PyTree) -> PyTree:
    """The state at a step.

    Args:
      like: a state with the structure, shapes, dtypes and shardings.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    return self._restore(step, state=ocp.args.StandardRestore(abstract)).state

  def _restore(self, step: int, **items: Any) -> Any:
    with bucket.reaching(self._folder):
      return self._manager.restore(step, args=ocp.args.Composite(**items))

  def wait(self) -> None:
    """Waits until all that was saved is complete."""
    with self._explained():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    with self._explained():
      self._manager.close()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Explains why a checkpoint can't be written, and names the one that is kept."""
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
      if bucket.holds(self._folder):  # There an incomplete one may have the name.
        steps = [entry for entry in steps if (entry / _COMMITTED).exists()]
    return max((int(entry.name) for entry in steps), default=None)


# The object with which Orbax completes a checkpoint in a bucket.
_COMMITTED = "commit_success.txt"


def _barrier(*, key: str, timeout_ms: int) -> None:
  """Orbax's barrier, which a thread that has failed does not enter.

  Orbax would wait for the others for twenty minutes, and they for what this one did
  not write. Its error is raised instead.
  """
  error = sys.exc_info()[1]
  if error is not None:
    raise error
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


# How the library that writes arrays reports the system's refusal.
_CODE = re.compile(r"os_error_code='(\d+)'")


def _refusal(error: BaseException | None) -> int | None:
  """The errno of the system's error behind this one, None where there is none."""
  while error is not None:
    if isinstance(error, OSError) and error.errno is not None:
      return error.errno
    if found := _CODE.search(str(error)):
      return int(found[1])
    error = error.__cause__ or error.__context__
  return None
