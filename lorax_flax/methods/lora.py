"""LoRA (arXiv 2106.09685): W + scale * a @ b, the product never formed."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA:
  """The low-rank delta of one kernel.

  For a kernel whose axes have the roles in, out and stack (found by tracing):

  Attributes:
    a: (*stack, *in, r), float32, trained.
    b: (*stack, r, *out), float32, trained.
    scale: () or (*stack,), float32, alpha / r; data, so that trials may differ.
    roles: the role of each kernel axis, in the kernel's order.
    dropout: rate applied to the input of `a`, where a key is given.
    layers: where the leading stack axis is adapted in part, the indices on that
      axis that have factors; None for all.
  """

  a: jax.Array
  b: jax.Array
  scale: jax.Array
  roles: tuple[str, ...] = field(metadata={"static": True})
  dropout: float = field(default=0.0, metadata={"static": True})
  layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})

  trained: ClassVar[tuple[str, ...]] = ("a", "b")

  @property
  def rank(self) -> int:
    return self.a.shape[-1]

  def factors(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The delta of a kernel of this `shape`, as factors laid out like the kernel.

    Returns:
      a, b with the kernel's axes and a last axis r, of size 1 on the axes that a
      factor does not carry, so that delta = sum(a * b, -1); scale is folded into b.
    """
    n = len(shape)
    stack, ins, outs = (axes_of(self.roles, role) for role in ("stack", "in", "out"))
    a, b, s = self.a, self.b, len(stack)
    b = b * self.scale.reshape(self.scale.shape + (1,) * (b.ndim - self.scale.ndim))
    if self.layers is not None:
      length, index = shape[stack[0]], jnp.asarray(self.layers)
      a = jnp.zeros((length, *a.shape[1:]), a.dtype).at[index].set(a)
      b = jnp.zeros((length, *b.shape[1:]), b.dtype).at[index].set(b)
    a = jnp.expand_dims(
      _to_kernel_order(a, (*stack, *ins)), tuple(outs)
    )  # (kernel axes with 1 for out, r)
    b = _to_kernel_order(jnp.moveaxis(b, s, -1), (*stack, *outs))
    b = jnp.expand_dims(b, tuple(ins))
    assert a.ndim == b.ndim == n + 1
    return a, b

  def delta(self, shape: tuple[int, ...]) -> jax.Array:
    """What is added to W, dense, float32, in the kernel's `shape`."""
    a, b = self.factors(shape)
    return dense(a, b, jnp.float32)


def axes_of(roles: tuple[str, ...], role: str) -> list[int]:
  """The kernel axes that have this role, in order."""
  return [axis for axis, r in enumerate(roles) if r == role]


def _to_kernel_order(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Sorts the leading axes of x (named by kernel axis), leaving the last, r."""
  order = sorted(range(len(axes)), key=lambda i: axes[i])
  return x.transpose((*order, len(axes)))


def dense(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
  """sum_r a * b for factors in the layout of `LoRA.factors`, as a contraction."""
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


def init(
  key: jax.Array,
  shape: tuple[int, ...],
  roles: tuple[str, ...],
  *,
  rank: int,
  scale: float,
  style: str,
  dropout: float = 0.0,
  layers: tuple[int, ...] | None = None,
) -> LoRA:
  """The starting delta, zero as a whole.

  Args:
    key: a key of this path alone.
    shape, roles: the kernel's.
    style: "uniform": a uniform within 1 / sqrt(fan in), b zero (PEFT's default, torch
      kaiming_uniform with a = sqrt 5); "gaussian": a normal with deviation 1 / r, b
      zero; "embedding": a zero, b normal(0, 1) (PEFT's Embedding).
    layers: indices on the leading stack axis that are adapted; None for all.
  """
  sizes = {
    role: tuple(shape[i] for i in axes_of(roles, role))
    for role in ("stack", "in", "out")
  }
  stack, ins, outs = sizes["stack"], sizes["in"], sizes["out"]
  a_shape, b_shape = (*ins, rank), (rank, *outs)

  def draw(k):
    if style == "embedding":
      return jnp.zeros(a_shape), jax.random.normal(k, b_shape, jnp.float32)
    if style == "gaussian":
      return jax.random.normal(k, a_shape, jnp.float32) / rank, jnp.zeros(b_shape)
    bound = 1 / math.sqrt(math.prod(ins))
    a = jax.random.uniform(k, a_shape, jnp.float32, -bound, bound)
    return a, jnp.zeros(b_shape)

  if not stack:
    a, b = draw(key)
  else:
    # Each place on the stack draws from its own index, so that neither the number of
    # layers nor the selection changes what a layer starts with.
    indices = jnp.arange(math.prod(stack), dtype=jnp.uint32).reshape(stack)
    if layers is not None:
      indices = indices[jnp.asarray(layers)]
    flat = indices.reshape(-1)
    a, b = jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(flat)
    a, b = (x.reshape(indices.shape + x.shape[1:]) for x in (a, b))
  return LoRA(a, b, jnp.float32(scale), roles, dropout, layers)
