"""Log lines as commands show them."""

import logging

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
