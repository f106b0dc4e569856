"""Strict by default: no implicit rank or dtype promotion anywhere in a test."""

import os

# libtpu is installed for the dry runs: nothing is to look for a TPU, in a test's own
# processes neither.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def quick_to_compile():
  """Programs of this module's tests are compiled in less time, and are slower."""
  jax.config.update("jax_disable_most_optimizations", True)
  jax.clear_caches()
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.clear_caches()  # The other tests' programs are to be their own.
