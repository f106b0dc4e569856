"""Order of recomputation, and precision, in operations with gradients of their own."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T = TypeVar("T")


def recomputed(kept: T, like: jax.Array, grad: jax.Array) -> tuple[T, jax.Array]:
  """`kept` and `like` for a backward pass, available only once `grad` is.

  A recomputation that depends on the forward pass's arrays alone could run early, and
  its result would be stored until it is needed, against the purpose of recomputing.
  A barrier prevents that in most compilers; XLA's for CPUs drops barriers before it
  schedules the program, so `like` also gets a dependence on the gradient.

  Args:
    kept: arrays of the forward pass.
    like: an array that all of the recomputation depends on.
    grad: of a shape that broadcasts to like's.

  Returns:
    kept, and like with its values unchanged.
  """
  kept, like, grad = lax.optimization_barrier((kept, like, grad))
  # The compiler can't fold it to `like`: 0 · x isn't 0 where x is not finite.
  return kept, like + 0.0 * grad.astype(like.dtype)


def with_residuals(run: Callable[..., T]) -> Callable[..., T]:
  """`run`, whose arrays for its gradient are complete once its result is.

  A compiler could cut a small residual out of a large array when the gradient is
  computed, and keep the large one until then.

  Args:
    run: a function of all that it depends on.
  """
  made = jax.custom_vjp(run)

  def forward(*operands):
    return lax.optimization_barrier(jax.vjp(run, *operands))

  made.defvjp(forward, lambda pullback, grad: pullback(grad))
  return made


def wide(dtype) -> np.dtype:
  """The dtype of sums and softmax: float32, or `dtype` where that is wider."""
  return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)
