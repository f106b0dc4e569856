"""Strict by default: no implicit rank or dtype promotion anywhere in a test."""

import os

# libtpu is installed for the dry runs: nothing is to look for a TPU, in a test's own
# processes neither.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import jax
import pytest

from tests import imports

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Test files that import a package which is not installed (torch, beside the newest JAX),
# with those packages. The others run; the summary says what was left out.
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


@pytest.fixture(scope="module")
def quick_to_compile():
  """Programs of this module's tests are compiled in less time, and are slower."""
  jax.config.update("jax_disable_most_optimizations", True)
  jax.clear_caches()
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.clear_caches()  # The other tests' programs are to be their own.
