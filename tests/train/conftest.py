import logging
import subprocess

import pytest

from lorax_flax.train.logs import console


@pytest.fixture
def logs():
  """Log lines on standard output, as the commands have them."""
  logger = logging.getLogger("lorax_flax")
  before = logger.handlers, logger.level, logger.propagate
  console.log_to_console()
  yield
  logger.handlers, level, logger.propagate = before
  logger.setLevel(level)


@pytest.fixture
def small_disk(tmp_path_factory):
  """Makes folders that hold little: (size, mount options) -> folder."""
  made = []

  def mount(size: str, how: str = "rw"):
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},{how}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
      pytest.skip("only a superuser can mount a small disk")
    made.append(folder)
    return folder

  yield mount
  for folder in made:
    subprocess.run(["umount", "-l", str(folder)], check=True)
