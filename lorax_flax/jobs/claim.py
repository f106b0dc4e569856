"""Folders of runs: nothing is loaded for one that can't be written to."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lorax_flax.distributed import processes
from lorax_flax.files import lock
from lorax_flax.files import workdir as files
from lorax_flax.jobs.settings import Settings


def check_writable(folders: Mapping[Path, Settings]) -> None:
  """Raises OSError or LoraxError for a folder that can't be written to; process 0."""
  if processes.first():
    for folder in folders:
      files.check_writable(folder)


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
  """Context in which the folders are this program's alone; process 0 holds them.

  Raises:
    LoraxError: a run is under way in one of them.
  """
  with contextlib.ExitStack() as stack:
    if processes.first():
      for folder in dict.fromkeys(folders):
        stack.enter_context(lock.held(folder))
    yield


def claim(
  folders: Mapping[Path, Settings], fingerprints: Mapping[str, str] | None = None
) -> None:
  """Writes each run's config.json; every process calls it.

  Args:
    folders: each run's settings by its folder, which `files.check` has passed.
    fingerprints: of what they are made from; see `lorax_flax.jobs.fingerprint`.
  """
  if processes.first():
    for folder, settings in folders.items():
      files.claim(folder, settings.to_json(), fingerprints)
  processes.barrier("the workdirs are claimed")
