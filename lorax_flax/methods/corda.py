"""CorDA (arXiv 2406.05223): LoRA that starts with directions of kernel and inputs."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax_flax.errors import check_known
from lorax_flax.methods.from_start import FromStart
from lorax_flax.nodes import node

_MODES = ("ipm", "kpm")


@node
@dataclass(frozen=True)
class CorDA(FromStart):
  """Fields of `FromStart`; the options are of the start.

  The singular directions are those of C W, C the mean of x xᵀ over the inputs x, and C
  is taken off again. mode="ipm" (instruction-previewed) takes the largest, "kpm"
  (knowledge-preserved) the smallest.
  """

  starts_from: ClassVar[str] = "inputs"
  options: ClassVar = {"mode": "ipm"}

  @staticmethod
  def weigh(x, weights, axes):
    """The inputs of each use over their largest, as PEFT has it; the number of uses."""
    rows = weights[..., None] > 0
    largest = jnp.where(rows, x, -jnp.inf).max((*axes, x.ndim - 1), keepdims=True)
    largest = jnp.where(largest == 0, 1.0, largest)  # of a layer that has no delta
    count = jnp.ones([n for i, n in enumerate(x.shape[:-1]) if i not in axes])
    return weights / largest[..., 0] ** 2, count

  @classmethod
  def of_matrices(cls, key, w, scale, target):
    """√(S / scale) on both sides of the chosen directions."""
    del key
    check_known("corda: mode", mode := target.options["mode"], _MODES)
    square, inverse = _damped(target.measured.mean_square)
    # torch's weight is (out, in): u has the inputs' directions here.
    u, s, v = jnp.linalg.svd(square @ w, full_matrices=False)
    chosen = slice(target.rank) if mode == "ipm" else slice(-target.rank, None)
    u, s, v = inverse @ u[..., chosen], s[..., chosen], v[..., chosen, :]
    root = jnp.sqrt(s[..., None, :] / scale)
    return u * root, jnp.swapaxes(root, -1, -2) * v


def _damped(square: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(…, n, n) with as much added to its diagonal as its inverse needs; that inverse."""
  n = square.shape[-1]
  one = jnp.broadcast_to(jnp.eye(n), square.shape)
  mean = jnp.trace(square, axis1=-2, axis2=-1)[..., None, None] / n

  def damped(damp):
    found = square + damp * mean * one
    return found, jnp.linalg.inv(found)

  def is_inexact(damp):
    found, inverse = damped(damp)
    error = jnp.linalg.norm(found @ inverse - one, axis=(-2, -1), keepdims=True)
    return ~(error < 0.05)

  def more(damp):
    return jnp.where(is_inexact(damp), 2 * damp, damp)

  start = jnp.full((*square.shape[:-2], 1, 1), 0.01)
  return damped(jax.lax.while_loop(lambda x: is_inexact(x).any(), more, start))
