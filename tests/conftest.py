"""Strict by default: no implicit rank or dtype promotion anywhere in a test."""

import os

# libtpu is installed for the dry runs: nothing is to look for a TPU, in a test's own
# processes neither.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
