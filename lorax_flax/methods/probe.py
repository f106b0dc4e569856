"""A delta that adds nothing, and whose gradients are the moments of its inputs.

Its first factor is [1 0], so that the product with x is x itself in the kernel's own
order, and its second factor is zero. Where that product is observed, its cotangent is
set to [0 w x, w]: the gradient of the first factor is then the sum of w x xᵀ and of w x
over all examples, at each place of a stack, however the program gets there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import by_role
from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.moments import Moments

# (inputs (…, n), weights of the same leading axes, the leading axes to sum over) ->
# (the weights in the sums, the count without those axes).
Weigh = Callable[[jax.Array, jax.Array, tuple[int, ...]], tuple[jax.Array, jax.Array]]
# (product with the first factor, second factor, the names of the axes of each, the
# sizes of the axes of rows) -> the product.
Observe = Callable[[jax.Array, jax.Array, str, str, tuple[int, ...]], jax.Array]


class Probe(NamedTuple):
  """Zeros in the factors of a target's delta, or their gradients: the moments.

  Attributes:
    first: (*stack, *in, n + 1).
    second: (*stack, 2n + 1, 1, …), whose last place has the count.
  """

  first: jax.Array
  second: jax.Array


def zeros(target: Any) -> Probe:
  """The zeros of a target."""
  stack, ins, outs = _sizes(target)
  n = math.prod(ins)
  first, second = (*stack, *ins, n + 1), (*stack, 2 * n + 1, *[1] * len(outs))
  return Probe(jnp.zeros(first), jnp.zeros(second))


def delta(target: Any, probe: Probe) -> LoRA:
  """The delta that adds nothing."""
  stack, ins, _ = _sizes(target)
  n = math.prod(ins)
  same = jnp.broadcast_to(jnp.eye(n).reshape(*ins, n), (*stack, *ins, n))
  a = jnp.concatenate([same, probe.first], axis=-1)
  return LoRA(a, probe.second, jnp.float32(1), target.roles, 0.0, target.layers)


def of_gradient(target: Any, gradient: Probe) -> Moments:
  """The moments that the gradient of a target's probe holds."""
  stack, ins, _ = _sizes(target)
  n = math.prod(ins)
  sums = gradient.first.reshape(*stack, n, n + 1)
  count = gradient.second.reshape(*stack, 2 * n + 1)[..., -1]
  return Moments(sums[..., :n], sums[..., n], count)


def _sizes(target: Any) -> list[list[int]]:
  """The sizes of the adapted stack, of the inputs and of the outputs."""
  axes = by_role(target.roles)
  sizes = [[target.shape[i] for i in axes[role]] for role in ("stack", "in", "out")]
  if target.layers is not None:
    sizes[0][0] = len(target.layers)
  return sizes


def observer(weigh: Weigh, weights: Sequence[jax.Array]) -> Observe:
  """The function to call with each product with a probe's first factor.

  Args:
    weights: of the rows of data, in the shape of their leading axes, (B, T) say; the
      first is taken that fits. An input of one row for each example, (B, n), has the
      largest of the example. None at all: each is 1.
  """

  def observe(z, other, names, other_names, rows):
    axes = tuple(i for i, c in enumerate(names[:-1]) if c not in other_names)
    held = [c for c in names[:-1] if c in other_names]
    order = [held.index(c) for c in other_names[:-1]]
    shape, dtype = other.shape, other.dtype

    @jax.custom_vjp
    def seen(z, other, rows):
      del other, rows
      return z

    def forward(z, other, rows):
      del other
      return z, (z, rows)

    def backward(kept, cotangent):
      del cotangent
      z, rows = kept
      x = z[..., : z.shape[-1] // 2].astype(jnp.float32)
      own, count = weigh(x, rows, axes)
      own = own[..., None]
      sums = jnp.concatenate([jnp.zeros_like(x), x * own, own], axis=-1)
      counted = jnp.zeros(shape, dtype).at[..., -1].set(count.transpose(order))
      return sums.astype(z.dtype), counted, jnp.zeros_like(rows)

    seen.defvjp(forward, backward)
    sizes = [n if i in axes else 1 for i, n in enumerate(z.shape[:-1])]
    own = _fitting(weights, rows).reshape(sizes)
    return seen(z, other, jnp.broadcast_to(own, z.shape[:-1]))

  return observe


def _fitting(weights: Sequence[jax.Array], rows: tuple[int, ...]) -> jax.Array:
  """The weights of rows with these axes, float32."""
  if not weights:
    return jnp.ones(rows, jnp.float32)
  for given in weights:
    w = given.astype(jnp.float32)
    if rows == w.shape[: len(rows)]:
      return w.max(tuple(range(len(rows), w.ndim)))
    if rows[: w.ndim] == w.shape:
      return jnp.broadcast_to(w.reshape(*w.shape, *[1] * (len(rows) - w.ndim)), rows)
    if w.size == math.prod(rows):
      return w.reshape(rows)
  shapes = " and ".join(str(w.shape) for w in weights)
  raise LoraxError(
    f"the weights of rows have shape {shapes}, and the rows of a target's inputs {rows}"
  )
