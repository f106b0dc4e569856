"""The unevaluated form in which a method's changed kernel meets a product."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Parts(NamedTuple):
  """x W' + bias for W' = out_scale * (W + sum_r a b), unevaluated.

  Every part has the kernel's axes and one more at the end, and size 1 on the axes that
  it does not carry. A delta that is not of low rank is `full(delta)`: one factor alone
  carries all axes, and every rule that follows factors follows it.

  Attributes:
    a: carries the in and the stack axes; its last axis is r.
    b: carries the out and the stack axes; its last axis is r, the scale folded in.
    out_scale: carries the out and the stack axes; its last axis is of size 1. None
      for 1. It may carry the in axes instead, and then scales the inputs.
    bias: carries the out and the stack axes, as out_scale; added to each product, None
      for 0.
  """

  a: jax.Array
  b: jax.Array
  out_scale: jax.Array | None = None
  bias: jax.Array | None = None


def full(delta: jax.Array) -> Parts:
  """The parts of a dense delta, (*kernel, 1)."""
  return Parts(delta, jnp.ones((1,) * delta.ndim, delta.dtype))


def product(x: jax.Array, y: jax.Array) -> jax.Array:
  """x @ y at the highest precision."""
  return jnp.matmul(x, y, precision="highest")


def dense(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
  """sum_r a * b for factors in the layout of `Parts`, as a contraction."""
  n = a.ndim - 1
  letters = [chr(ord("a") + i) for i in range(n)]
  dims = [max(i, j) for i, j in zip(a.shape[:-1], b.shape[:-1], strict=True)]
  named, arrays = [], []
  for x in (a, b):
    keep = [i for i in range(n) if x.shape[i] != 1]
    arrays.append(x.reshape([x.shape[i] for i in keep] + [x.shape[-1]]))
    named.append("".join(letters[i] for i in keep) + "z")
  out = "".join(letters[i] for i in range(n) if dims[i] != 1)
  y = jnp.einsum(f"{named[0]},{named[1]}->{out}", *arrays, precision="highest").astype(
    dtype
  )
  return y.reshape(dims)
