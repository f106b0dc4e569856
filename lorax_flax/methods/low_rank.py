"""What the low-rank methods share: two factors beside a kernel, and how they lie."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp


class Parts(NamedTuple):
  """What a method makes of a kernel W, as x W' + bias for W' = gain * (W + sum_r a b).

  Every part has the kernel's axes and one more at the end, and size 1 on the axes that
  it does not carry.

  Attributes:
    a: carries the in and the stack axes; its last axis is r.
    b: carries the out and the stack axes; its last axis is r, the scale folded in.
    gain: carries the out and the stack axes; its last axis is of size 1. None for 1.
    bias: as gain; added to each product, None for 0.
  """

  a: jax.Array
  b: jax.Array
  gain: jax.Array | None = None
  bias: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
  """A delta of one kernel that holds two factors; the base of LoRA and its kin.

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
    stack, ins, outs = (axes_of(self.roles, role) for role in ("stack", "in", "out"))
    b = jnp.moveaxis(self.scaled_b(), len(stack), -1)
    a, b = self.in_all_layers(self.a, shape), self.in_all_layers(b, shape)
    a = jnp.expand_dims(_to_kernel_order(a, (*stack, *ins)), tuple(outs))
    b = jnp.expand_dims(_to_kernel_order(b, (*stack, *outs)), tuple(ins))
    assert a.ndim == b.ndim == len(shape) + 1
    return a, b

  def scaled_b(self) -> jax.Array:
    """b with the scale folded in, in b's own layout."""
    ones = (1,) * (self.b.ndim - self.scale.ndim)
    return self.b * self.scale.reshape(self.scale.shape + ones)

  def in_all_layers(self, t, shape, fill: float = 0.0) -> jax.Array:
    """A leaf of the adapted layers as one of all layers of a kernel of this shape."""
    if self.layers is None:
      return t
    length = shape[axes_of(self.roles, "stack")[0]]
    whole = jnp.full((length, *t.shape[1:]), fill, t.dtype)
    return whole.at[jnp.asarray(self.layers)].set(t)

  def per_out(self, t, shape: tuple[int, ...], fill: float) -> jax.Array:
    """A (*stack, *out) leaf laid out as `Parts.gain` is; `fill` in other layers."""
    stack, ins, outs = (axes_of(self.roles, role) for role in ("stack", "in", "out"))
    t = self.in_all_layers(t, shape, fill)[..., None]
    return jnp.expand_dims(_to_kernel_order(t, (*stack, *outs)), tuple(ins))

  def delta(self, shape: tuple[int, ...]) -> jax.Array:
    """scale * a @ b, dense, float32, in the kernel's `shape`."""
    a, b = self.factors(shape)
    return dense(a, b, jnp.float32)

  def parts(self, w: jax.Array) -> Parts:
    """What the method makes of the kernel w, unevaluated."""
    return Parts(*self.factors(w.shape))

  def merged(self, w: jax.Array) -> jax.Array:
    """W', dense, float32."""
    return w.astype(jnp.float32) + self.delta(w.shape)

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32, to rounding."""
    return w.astype(jnp.float32) - self.delta(w.shape)


def axes_of(roles: tuple[str, ...], role: str) -> list[int]:
  """The kernel axes that have this role, in order."""
  return [axis for axis, r in enumerate(roles) if r == role]


def sizes_of(shape: tuple[int, ...], roles: tuple[str, ...], role: str):
  """The sizes of a kernel's axes that have this role, in order."""
  return tuple(shape[i] for i in axes_of(roles, role))


def _to_kernel_order(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Sorts the leading axes of x (named by kernel axis), leaving the last, r."""
  order = sorted(range(len(axes)), key=lambda i: axes[i])
  return x.transpose((*order, len(axes)))


def dense(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
  """sum_r a * b for factors in the layout of `LowRank.factors`, as a contraction."""
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
