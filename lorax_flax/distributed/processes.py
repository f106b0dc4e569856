"""Several processes that train together: joining, agreeing, and stopping."""

import itertools
import os
import signal
import threading
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from lorax_flax.errors import LoraxError, prefixed

# What a process that was told to stop, and saved, exits with: what a shell reports of
# one that SIGTERM ended.
PREEMPTED = 143
# What one exits with that ends because another is gone. GKE, through xpk, starts a job
# again after codes from 127 on, and not after a mistake of the user's, which is 1.
LOST = 144

# Set by `launch.local`, or by a person, in place of a cluster's own variables.
COORDINATOR = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
NUMBER = "JAX_PROCESS_ID"

# Seconds without a sign of life after which a process counts as lost, where nothing
# else has told (see `lorax_flax.distributed.watchdog`).
HEARTBEAT = 30


class Preempted(Exception):
  """The process was told to stop (SIGTERM), and has saved.

  Attributes:
    step: of the checkpoint.
  """

  def __init__(self, step: int):
    super().__init__(
      f"told to stop: saved at step {step}. The same command goes on from there"
    )
    self.step = step


def initialize(cluster: bool = False) -> None:
  """Joins the other processes of this run, before JAX has met its devices.

  Does nothing where there is only this one: no coordinator in the environment.

  Args:
    cluster: to ask the cluster (Slurm, Open MPI, Kubernetes, a TPU pod) who the others
      are, as `jax.distributed` does.

  Raises:
    LoraxError: the environment has a part of what is needed; the others do not come.
  """
  address = os.environ.get(COORDINATOR)
  if address is None and not cluster:
    return
  with prefixed("can't join the other processes", RuntimeError, ValueError):
    if cluster:
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    else:
      jax.distributed.initialize(
        address,
        _number(COUNT),
        _number(NUMBER),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT,
      )


def _number(name: str) -> int:
  text = os.environ.get(name, "")
  if not text.isdecimal():
    raise LoraxError(f"{COORDINATOR} is set, so {name} must be a number, not {text!r}")
  return int(text)


def first() -> bool:
  """True in process 0, which writes and logs for all."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: bool) -> bool:
  """Broadcasts a boolean from process 0 to all; waits for the devices."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


# Of this process, whether it is to stop; all processes ask alike.
_QUESTIONS = itertools.count(1)


class StopRequest:
  """Context in which SIGTERM requests a stop instead of killing the process."""

  def __init__(self) -> None:
    self._asked = False
    self._before: signal.Handlers | None = None

  def __enter__(self) -> Self:
    # With several processes JAX listens, and carries the news to all of them. Python
    # lets only the main thread listen.
    alone = jax.process_count() == 1
    if alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._ask)  # type: ignore[assignment]
    return self

  def __exit__(self, *error) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _ask(self, *signal_and_frame) -> None:
    self._asked = True

  def reached(self, step: int) -> bool:
    """True where the run is to stop after this step; the same in every process."""
    del step
    if jax.process_count() > 1:
      # JAX says yes to the question whose number follows the last that had been asked
      # when the signal came. Numbered by the steps, a run that goes on after step 100
      # would wait for number 1 where it came before the first question.
      return multihost_utils.reached_preemption_sync_point(next(_QUESTIONS))
    return self._asked
