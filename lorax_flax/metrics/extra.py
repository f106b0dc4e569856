"""Packages of the extra "metrics", imported where they are used."""

import importlib
from typing import Any

from lorax_flax.errors import LoraxError


def module(name: str) -> Any:
  """A module of the extra's packages; LoraxError where it is not installed."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise LoraxError(
      f"{name.partition('.')[0]} can't be imported ({error}): it comes with the extra "
      "metrics, pip install 'lorax-flax[metrics]'"
    ) from error
