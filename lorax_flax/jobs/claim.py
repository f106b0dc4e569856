"""Folders of runs: nothing is loaded for one that can't be written to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from experiments.cli import command as cli
from lorax_flax.distributed import processes
from lorax_flax.files import workdir as files
from lorax_flax.jobs import compile_cache
from lorax_flax.jobs.settings import Settings

T = TypeVar("T")


def prepare(
  wanted: Mapping[Path, Settings], build: Callable[[Callable[[str], None]], T]
) -> T:
  """Prepares runs, and claims their folders once that is done.

  Every process calls it; the first one writes, and speaks.

  Args:
    wanted: each run's settings by its folder, which `files.check` has passed.
    build: does the work; takes what takes a line for the user.

  Raises:
    OSError, LoraxError: a folder can't be written to; what `build` raises.
  """
  if processes.first():
    for folder in wanted:
      files.check_writable(folder)
  compile_cache.use(next(iter(wanted.values())).compilation_cache)
  built = build(print if processes.first() else cli.silent)
  if processes.first():
    for folder, settings in wanted.items():
      files.claim(folder, settings.to_json())
  processes.barrier("the workdirs are claimed")
  return built
