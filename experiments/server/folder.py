"""The folder of adapters: each folder in it is an adapter of that name."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lorax_flax.errors import LoraxError, check_known

log = logging.getLogger(__name__)


def names(root: Path | None) -> list[str]:
  """The names of the adapters, in order.

  Raises:
    LoraxError: no such folder.
  """
  if root is None:
    return []
  if not root.is_dir():
    raise LoraxError(f"no folder {root}")
  return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")


def find(root: Path | None, path: str) -> Path:
  """The folder of an adapter.

  Args:
    path: its name, or its path within the folder of adapters.

  Raises:
    LoraxError: a path that leaves the folder, or no such adapter.
  """
  if root is None:
    raise LoraxError("this server has no folder of adapters: --adapters=DIR")
  # Without a look at the disk: what is outside is not to be told from what is not.
  parent, name = os.path.split(os.path.normpath(os.path.join(root.absolute(), path)))
  if Path(parent) != Path(os.path.normpath(root.absolute())) or "\0" in path:
    raise LoraxError(f"{path!r:.200} is no folder in the folder of adapters")
  check_known("adapter", name, names(root))
  return root / name


@contextlib.contextmanager
def leaving_out(name: str) -> Iterator[None]:
  """Logs the error of an adapter that can't be served, and goes on."""
  try:
    yield
  except LoraxError as error:
    log.error(f"the adapter {name} is left out: {error}")
