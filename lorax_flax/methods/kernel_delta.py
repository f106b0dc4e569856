"""Deltas that are followed through the program, and those of `LoraConfig.method`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import LeafAxes, Shape, by_role, resolved, shape_of
from lorax_flax.methods.delta import Delta
from lorax_flax.methods.parts import Parts, dense

# Those of `adapt.plan`, a room above this one.
Target: TypeAlias = Any
Plan: TypeAlias = Any


class Followed(Delta):
  """A delta that follows its kernel to each product; neither is formed there.

  Attributes:
    roles: static, "in", "out" or "stack" for each of the kernel's axes.
    dropout: static, rate on the input of the delta's part of a product.
  """

  if TYPE_CHECKING:

    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def dropout(self) -> float: ...

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    raise NotImplementedError

  def merged(self, w: jax.Array) -> jax.Array:
    """W', dense, float32."""
    a, b, out_scale, _ = self.parts(w)
    whole = w.astype(jnp.float32) + dense(a, b, jnp.float32)
    return whole if out_scale is None else out_scale[..., 0] * whole

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32, where the parts don't depend on W."""
    a, b, out_scale, _ = self.parts(w)
    whole = w.astype(jnp.float32)
    whole = whole if out_scale is None else whole / out_scale[..., 0]
    return whole - dense(a, b, jnp.float32)

  def added_bias(self, w: jax.Array) -> jax.Array | None:
    """The addition to the base's own bias, (*stack, *out)."""
    bias, axes = self.parts(w).bias, by_role(self.roles)
    if bias is None:
      return None
    order = (*axes["stack"], *axes["out"], *axes["in"])
    bias = bias[..., 0].transpose(order)
    return bias.reshape(bias.shape[: len(order) - len(axes["in"])])

  def kernel_axes(self) -> Mapping[str, tuple[int, ...]]:
    return by_role(self.roles)


class KernelDelta(Followed):
  """A delta of a target, by a method that `LoraConfig.method` may name.

  Its dataclass has the static fields `roles`, `dropout` and `layers`. A leaf `scale` is
  alpha / r, () or (*stack,), data of each trial.
  """

  per_trial = ("scale",)

  @classmethod
  def start(cls, key: jax.Array, kernel: Any, target: Target, plan: Plan) -> Self:
    """The delta before the first step; it changes nothing.

    Args:
      key: the adapter's. `target.key(key)` is the target's own, a function of the key
        and the path; what all targets share is drawn from `key` itself.
      kernel: the base's leaf. Read its values only where they are needed.
      target: shape, roles, rank, scale, options … of this kernel.
      plan: all targets, and the dropout, as `adapt.plan.Plan`.
    """
    raise NotImplementedError

  @classmethod
  def drawn(
    cls,
    key: jax.Array,
    target: Target,
    draw: Callable[[jax.Array], dict[str, jax.Array]],
  ) -> dict[str, jax.Array]:
    """The leaves that `draw(key)` makes for one layer, made for each that is adapted.

    Each place of the stack draws from its own index, so that neither the number of
    layers nor the selection changes what a layer starts with. A layer's leaves are zero
    beyond its own rank.
    """
    stack = [target.shape[axis] for axis in by_role(target.roles)["stack"]]
    if not stack:
      return draw(key)
    indices = jnp.arange(math.prod(stack), dtype=jnp.uint32).reshape(stack)
    if target.layers is not None:
      indices = indices[jnp.asarray(target.layers)]
    leaves = jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(indices.reshape(-1))
    leaves = {n: x.reshape(indices.shape + x.shape[1:]) for n, x in leaves.items()}
    if target.ranks is None:
      return leaves
    ranks = jnp.asarray(target.ranks)
    return {
      name: _within(x, resolved(cls.axes[name], by_role(target.roles)), ranks)
      for name, x in leaves.items()
    }

  @classmethod
  def of(
    cls,
    leaves: Mapping[str, jax.Array],
    scale: Any,
    roles: tuple[str, ...],
    dropout: float = 0.0,
    layers: tuple[int, ...] | None = None,
  ) -> Self:
    """A delta of these trained leaves."""
    scale = jnp.asarray(scale, jnp.float32)
    return cls(**leaves, scale=scale, roles=roles, dropout=dropout, layers=layers)

  @classmethod
  def leaf_shapes(
    cls, shape: Shape, roles: Sequence[str], sizes: Mapping[str, Any]
  ) -> dict[str, Shape]:
    """The shapes of the trained leaves beside a kernel.

    Args:
      shape, roles: the kernel's.
      sizes: of the method's own axes: the rank, and options.
    """
    kernel = by_role(roles)
    return {
      n: shape_of(resolved(cls.axes[n], kernel), shape, sizes) for n in cls.trained
    }

  @classmethod
  def layer_shapes(cls, target: Target) -> dict[str, Shape]:
    """The shapes of the trained leaves of one layer, as `drawn` draws them."""
    pairs = zip(target.shape, target.roles, strict=True)
    shape, roles = zip(*((n, r) for n, r in pairs if r != "stack"), strict=True)
    return cls.leaf_shapes(shape, roles, {"rank": target.rank, **target.options})

  def scales(self) -> jax.Array:
    """The scale at each place of the stack that has a delta, (*stack,)."""
    scale, depth = self.leaves()["scale"], self.roles.count("stack")
    stack = self.leaves()[self.trained[0]].shape[:depth]
    ones = (1,) * (depth - scale.ndim)
    return jnp.broadcast_to(scale.reshape(scale.shape + ones), stack)

  def laid_out(
    self, name: str, shape: Shape, fill: float = 0.0, value: jax.Array | None = None
  ) -> jax.Array:
    """A leaf in the layout of `Parts`, for a kernel of this shape.

    Args:
      fill: the leaf's value in layers that have no delta.
      value: taken in place of the leaf's own.

    Returns:
      The kernel's axes, of size 1 where the leaf does not carry them, then the leaf's
      own axes, or one of size 1.
    """
    axes = self.leaf_axes(name)
    t = self.leaves()[name] if value is None else value
    if self.layers is not None and t.ndim:
      length = shape[by_role(self.roles)["stack"][0]]
      full = jnp.full((length, *t.shape[1:]), fill, t.dtype)
      t = full.at[jnp.asarray(self.layers)].set(t)
    # The kernel's axes in its order, then the method's own.
    places = [len(shape) if isinstance(axis, str) else axis for axis in axes]
    t = t.transpose(sorted(range(t.ndim), key=places.__getitem__))
    t = jnp.expand_dims(t, [i for i in range(len(shape)) if i not in axes])
    return t if t.ndim > len(shape) else t[..., None]


def _within(leaf: jax.Array, axes: LeafAxes, ranks: jax.Array) -> jax.Array:
  """A leaf of stacked layers, zero beyond the rank of each layer."""
  own = ranks.reshape(-1, *[1] * (leaf.ndim - 1))
  for place, axis in enumerate(axes):
    if axis == "rank":
      along = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, place)
      leaf = jnp.where(along < own, leaf, 0.0)
  return leaf
