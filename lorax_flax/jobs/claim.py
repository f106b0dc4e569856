"""Folders of runs: nothing is loaded for one that can't be written to."""

from collections.abc import Mapping
from pathlib import Path

from lorax_flax.distributed import processes
from lorax_flax.files import workdir as files
from lorax_flax.jobs.settings import Settings


def check_writable(folders: Mapping[Path, Settings]) -> None:
  """Raises OSError or LoraxError for a folder that can't be written to; process 0."""
  if processes.first():
    for folder in folders:
      files.check_writable(folder)


def claim(folders: Mapping[Path, Settings]) -> None:
  """Writes each run's config.json; every process calls it.

  Args:
    folders: each run's settings by its folder, which `files.check` has passed.
  """
  if processes.first():
    for folder, settings in folders.items():
      files.claim(folder, settings.to_json())
  processes.barrier("the workdirs are claimed")
