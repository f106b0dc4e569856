"""The places of a program, and the runs that take turns in them; on the host."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_flax.distributed import processes
from lorax_flax.files import workdir
from lorax_flax.train.checkpoint import Progress
from lorax_flax.train.config import Durations
from lorax_flax.train.judging import Standing
from lorax_flax.train.logs.history import Diverged, History
from lorax_flax.train.logs.writer import Record, SilentRecord
from lorax_flax.train.objective import Objective
from lorax_flax.train.trials import Run


@dataclass(frozen=True)
class Seat:
  """A run in its place.

  Attributes:
    number: of the run.
    start: number of steps of the loop before the run's first.
    seconds_before: of the loop's wall time, by what it was spent on, up to then.
  """

  number: int
  run: Run
  start: int
  history: History
  seconds_before: Mapping[str, float]

  @property
  def trains(self) -> bool:
    """False for a run that has ended early."""
    return self.history.failed is None and self.history.pruned is None

  def seconds(self, now: Mapping[str, float]) -> dict[str, float]:
    """The part of the loop's seconds since the run's first step."""
    return {name: x - self.seconds_before.get(name, 0.0) for name, x in now.items()}


def first(runs: int, places: int, position: Mapping[str, Any]) -> list[Progress]:
  """Progress of all runs before the first step; `position` is of the data."""
  seated = [Progress(dict(position), place=i) for i in range(places)]
  waiting = Progress(dict(position), place=None, start=None)
  return seated + [waiting] * (runs - places)


def checked(own: Progress, folder: Path) -> Progress:
  """The progress of a run at a restart: one whose result was lost starts anew."""
  over = own.place is None and own.start is not None
  if not over or own.failed or own.pruned:
    return own
  there = processes.first() and workdir.result(folder) is not None
  if processes.broadcast(there):
    return own
  return Progress(own.position, place=None, start=None)


class Places:
  """Runs by place, those that wait, and the progress of those that are over."""

  def __init__(
    self,
    runs: Sequence[Run],
    count: int,
    plan: Durations,
    objective: Objective,
    progress: Sequence[Progress],
    done: int,
  ):
    """Seats the runs as their progress has it, after `done` steps of the loop."""
    self._runs, self._plan, self._objective = runs, plan, objective
    self._progress = [*progress]
    self.seats: list[Seat | None] = [None] * count
    for number, own in enumerate(progress):
      if own.place is not None:
        self._seat(number, own, done)

  def seated(self) -> Iterator[tuple[int, Seat]]:
    """The places that are taken, with who is there; also those that ended early."""
    for place, seat in enumerate(self.seats):
      if seat is not None:
        yield place, seat

  def training(self) -> list[tuple[int, Seat]]:
    """The places whose run has not ended early."""
    return [(place, seat) for place, seat in self.seated() if seat.trains]

  def waiting(self) -> list[int]:
    """Numbers of the runs that have had no place yet."""
    return [n for n, own in enumerate(self._progress) if own.start is None]

  def next(self, place: int, done: int, seconds: Mapping[str, float]) -> Seat | None:
    """Seats the next of those that wait; leaves the place empty where none does."""
    seat = self.seats[place]
    assert seat is not None
    self._progress[seat.number] = self._of(seat, None)
    self.seats[place] = None
    seat.history.record.close()
    if not (waiting := self.waiting()):
      return None
    number = waiting[0]
    own = dataclasses.replace(
      self._progress[number], place=place, start=done, seconds_before=dict(seconds)
    )
    return self._seat(number, own, done)

  def any(self) -> bool:
    """True where a place is taken."""
    return any(seat is not None for seat in self.seats)

  def tokens(self) -> int:
    """Number of units that all runs have trained on."""
    return sum(own.tokens for own in self.progress({}, {}))

  def mean_step(self, done: int) -> int:
    """Number of steps that stand for the work that is done; those of all, if none ends
    early."""
    at = {seat.number: done - seat.start for _, seat in self.seated()}
    steps = [
      0 if own.start is None else at.get(number, self._plan.total)
      for number, own in enumerate(self._progress)
    ]
    return sum(steps) // len(self.seats)

  def ended(self, number: int) -> dict[str, Any] | Diverged | None:
    """The result of a run that was over before the last restart."""
    own = self._progress[number]
    if own.failed is not None:
      return Diverged(**own.failed)
    return workdir.result(self._runs[number].folder) if own.pruned is None else None

  def progress(
    self, position: Mapping[str, Any], seconds: Mapping[str, float]
  ) -> list[Progress]:
    """Each run's part of a checkpoint; what is the loop's is the same in all."""
    found = [*self._progress]
    for place, seat in self.seated():
      found[seat.number] = self._of(seat, place)
    return [
      dataclasses.replace(own, position=dict(position), seconds=dict(seconds))
      for own in found
    ]

  def standings(self, done: int) -> list[Standing]:
    """Each run's standing after `done` steps of the loop."""
    at = {seat.number: done - seat.start for _, seat in self.seated()}
    return [
      Standing(
        dict(own.scores),
        own.pruned,
        own.failed,
        own.start is not None
        and (own.pruned or own.failed) is None
        and at.get(number, self._plan.total) == self._plan.total,
      )
      for number, own in enumerate(self.progress({}, {}))
    ]

  def close(self) -> None:
    """Closes the records of those that are seated."""
    for _, seat in self.seated():
      seat.history.record.close()

  def _seat(self, number: int, own: Progress, done: int) -> Seat:
    assert own.place is not None
    assert own.start is not None
    run = self._runs[number]
    record = (
      Record(run.folder, done - own.start) if processes.first() else SilentRecord()
    )
    reaction = run.config.on_nonfinite
    history = History(record, self._plan, self._objective, reaction, own, run.name)
    seat = Seat(number, run, own.start, history, own.seconds_before)
    self._progress[number], self.seats[own.place] = own, seat
    return seat

  def _of(self, seat: Seat, place: int | None) -> Progress:
    before = dict(seat.seconds_before)
    return seat.history.progress(
      {}, {}, place=place, start=seat.start, seconds_before=before
    )
