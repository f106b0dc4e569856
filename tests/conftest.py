"""Strict by default: no implicit rank or dtype promotion anywhere in a test."""

import os
import subprocess

# libtpu is installed for the dry runs: nothing is to look for a TPU, in a test's own
# processes neither.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests import compiler

# Most of the time is XLA's, of which a fourth is left. torch's threads would wait
# for one another more than they compute. Both hold in a test's own processes too.
os.environ.setdefault("XLA_FLAGS", compiler.QUICK)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs need not know the lines that they come from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# A run would start anew for large pages.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
# No test finds another's programs, or leaves its own in the user's cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

from pathlib import Path

import jax
import pytest

from experiments.cli import collector
from tests import imports

# Folder of published files that the project does not ship (loralib's released adapter,
# GLUE's archive), for the tests marked real_data.
REAL_DATA = os.environ.get("LORAX_FLAX_TEST_DATA")

# Tracing makes many objects that live long: a tenth of the time went into looking
# through them for what does not.
collector.seldom()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Test files that import what is not installed (torch, beside the newest JAX), with the
# packages that each lacks. The others run; the summary says what was left out.
LEFT_OUT = {p: m for p in imports.files("tests") if (m := imports.missing(p))}
collect_ignore = [str(path) for path in LEFT_OUT]


def pytest_terminal_summary(terminalreporter):
  # A helper (tests/models/family.py) is no test file, and those that import it are.
  files = [p for p in LEFT_OUT if p.name.startswith("test_")]
  if files:
    packages = sorted(set().union(*(LEFT_OUT[p] for p in files)))
    names = ", ".join(str(p.relative_to(Path(__file__).parent)) for p in files)
    terminalreporter.write_line(
      f"left out {len(files)} test files, since {', '.join(packages)} are not"
      f" installed: {names}"
    )


def pytest_runtest_setup(item):
  if item.get_closest_marker("real_data") and not REAL_DATA:
    pytest.skip("LORAX_FLAX_TEST_DATA names no folder of published files")


@pytest.fixture(scope="session")
def real_data():
  """Folder of published files, for the tests marked real_data."""
  return Path(REAL_DATA)


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
