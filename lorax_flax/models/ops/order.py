"""When a recomputation may run."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T = TypeVar("T")


def recomputed(kept: T, like: jax.Array, grad: jax.Array) -> tuple[T, jax.Array]:
  """`kept` and `like` for a backward pass, not to be used before `grad` is there.

  What is recomputed from the forward pass's arrays alone could run at once, and would
  then be stored until it is needed: more memory than was saved by not keeping it.
  A barrier says so to most compilers; XLA's for CPUs drops barriers before it orders
  the program, so there `like` takes a dependence on the gradient besides.

  Args:
    kept: arrays of the forward pass.
    like: an array that all of the recomputation goes through.
    grad: of a shape that broadcasts to like's.

  Returns:
    kept, and like in its own values.
  """
  kept, like, grad = lax.optimization_barrier((kept, like, grad))
  # Not folded to `like`: 0 · x isn't 0 where x is not finite.
  return kept, like + 0.0 * grad.astype(like.dtype)


def wide(dtype) -> np.dtype:
  """float32, or `dtype` where that is wider: what sums and softmax are computed in."""
  return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)
