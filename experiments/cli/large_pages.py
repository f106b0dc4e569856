"""Large pages for large arrays, where the system's allocator has to be asked for them.

XLA on the CPU takes one block from the C library for all of a step's temporaries and
returns it after the step. With pages of 4 KiB each step then spends an eighth of its
time on a quarter of a million page faults. glibc (2.35 and later) asks for pages of
2 MiB if a variable says so when the process starts, so the process starts anew, once.
"""

import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_SETTING = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
  """Starts this command anew with large pages; returns where that is of no use."""
  if not _available():
    return
  environment = with_large_pages(os.environ)
  if environment == os.environ:
    return
  sys.stdout.flush()
  sys.stderr.flush()
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_large_pages(environment: Mapping[str, str]) -> MutableMapping[str, str]:
  """The environment, asking for large pages unless it says something of them itself."""
  own = environment.get(_TUNABLES, "")
  if _SETTING in own:
    return dict(environment)
  tunables = ":".join(filter(None, (own, f"{_SETTING}=1")))
  return {**environment, _TUNABLES: tunables}


def _available() -> bool:
  library, version = platform.libc_ver()
  if library != "glibc" or not _KERNEL.is_file():
    return False
  recent = tuple(map(int, version.split(".")[:2])) >= (2, 35)
  return recent and "[never]" not in _KERNEL.read_text()
