"""Deltas that are followed through the program, and those of `LoraConfig.method`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax import quant
from lorax_flax.methods.axes import LeafAxes, Shape, by_role, fans, resolved, shape_of
from lorax_flax.methods.delta import Delta, OnBias
from lorax_flax.methods.parts import Parts, dense, full

# Those of `adapt.plan`, a room above this one.
Target: TypeAlias = Any
Plan: TypeAlias = Any


class Followed(Delta):
  """A delta that follows its kernel to each product; neither is formed there.

  Attributes:
    roles: static, "in", "out" or "stack" for each of the kernel's axes.
    dropout: static, rate on the input of the delta's part of a product.
    choice: the slot that is meant, of a delta that holds several; None for one.
  """

  if TYPE_CHECKING:

    @property
    def choice(self) -> Any: ...

    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def dropout(self) -> float: ...

  else:
    choice = None

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

  def parts_beside(self, w: jax.Array, bias: jax.Array | None) -> Parts:
    """The changed kernel of a module whose own bias is this, (*stack, *out)."""
    parts = self.parts(w)
    if bias is None or (scale := self._bias_scale(parts)) is None:
      return parts
    axes = by_role(self.roles)
    bias = bias.transpose(np.argsort((*axes["stack"], *axes["out"])))
    bias = jnp.expand_dims(bias, axes["in"])[..., None].astype(jnp.float32)
    return parts._replace(bias=(scale - 1) * bias)

  def on_bias(self, w: jax.Array) -> OnBias:
    if not self.has_bias and not self.scales_bias:
      return OnBias()
    parts = self.parts(quant.dense(w))
    return OnBias(*map(self._as_bias, (self._bias_scale(parts), parts.bias)))

  def _bias_scale(self, parts: Parts) -> jax.Array | None:
    scale, ins = parts.out_scale, by_role(self.roles)["in"]
    if not self.scales_bias or scale is None or any(scale.shape[i] != 1 for i in ins):
      return None
    return scale

  def _as_bias(self, part: jax.Array | None) -> jax.Array | None:
    """A part that carries the out and the stack axes, (*stack, *out)."""
    if part is None:
      return None
    axes = by_role(self.roles)
    order = (*axes["stack"], *axes["out"], *axes["in"])
    part = part[..., 0].transpose(order)
    return part.reshape(part.shape[: len(order) - len(axes["in"])])

  @classmethod
  def named_axes(
    cls, roles: Sequence[str], sizes: Mapping[str, Any]
  ) -> Mapping[str, tuple[int, ...]]:
    """A kernel's axes by the names that `axes` has for them.

    Args:
      sizes: of the method's own axes, and its options.
    """
    del sizes
    return by_role(roles)

  def kernel_axes(self) -> Mapping[str, tuple[int, ...]]:
    return self.named_axes(self.roles, vars(self))


class KernelDelta(Followed):
  """A delta of a target, by a method that `LoraConfig.method` may name.

  Its dataclass has the static fields `roles`, `dropout` and `layers`, and those of its
  options that it needs after the start. A leaf `scale`, where the method has one, is
  alpha / r, () or (*stack,), data of each trial.

  Attributes:
    has_rank: whether `LoraConfig.rank` means something to the method.
    pads_rank: whether zeros beyond its rank change nothing, so that layers and trials
      of other ranks can be stacked.
    takes_tables: whether it is defined for weights whose rows are looked up.
    starts_from: what `start` looks at: the "kernel", or what was measured over a few
      batches and is `target.measured`: the "gradient" of a loss by the kernel, or the
      `Moments` of its "inputs".
    takes_init: whether `LoraConfig.init` means something to the method.
    selections: options that name targets, as `LoraConfig.targets` does; of one target,
      whether it is named.
  """

  per_trial: ClassVar[tuple[str, ...]] = ("scale",)
  has_rank: ClassVar[bool] = True
  pads_rank: ClassVar[bool] = True
  takes_tables: ClassVar[bool] = True
  starts_from: ClassVar[str] = "kernel"
  takes_init: ClassVar[bool] = False
  selections: ClassVar[tuple[str, ...]] = ()

  @classmethod
  def start(cls, key: jax.Array, kernel: Any, target: Target, plan: Plan) -> Self:
    """The delta before the first step; it changes nothing.

    Args:
      key: the adapter's. `target.key(key)` is the target's own, a function of the key
        and the path; what all targets share is drawn from `key` itself.
      kernel: the base's leaf. Read its values only where they are needed.
      target: shape, roles, rank, scale, options, `measured` … of this kernel.
      plan: all targets, and the dropout, as `adapt.plan.Plan`.
    """
    raise NotImplementedError

  @staticmethod
  def weigh(
    x: jax.Array, weights: jax.Array, axes: tuple[int, ...]
  ) -> tuple[jax.Array, jax.Array]:
    """The weights of inputs in their `Moments`, and the total of a use.

    Args:
      x: (…, n).
      weights: (…,), those of the rows of data.
      axes: those of (…,) that hold rows; the others are of a stack.
    """
    del x
    return weights, weights.sum(axes)

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
    return cls.within_ranks(leaves, target)

  @classmethod
  def within_ranks(
    cls, leaves: Mapping[str, jax.Array], target: Target
  ) -> dict[str, jax.Array]:
    """Leaves that are zero beyond the rank of each stacked layer."""
    if target.ranks is None:
      return dict(leaves)
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
    options: Mapping[str, Any] | None = None,
  ) -> Self:
    """A delta of these leaves; the scale of those that have one."""
    own = {f.name for f in fields(cls)}
    kept = {n: x for n, x in (options or {}).items() if n in own}
    if "scale" in own:
      kept["scale"] = jnp.asarray(scale, jnp.float32)
    return cls(**leaves, **kept, roles=roles, dropout=dropout, layers=layers)

  @classmethod
  def of_target(
    cls, leaves: Mapping[str, jax.Array], target: Target, plan: Plan
  ) -> Self:
    """The delta of a target that starts with these leaves."""
    options = {**target.options, "bias_name": target.bias}
    return cls.of(
      leaves, target.scale, target.roles, plan.dropout, target.layers, options
    )

  @classmethod
  def zeros(cls, key: jax.Array, target: Target, plan: Plan) -> Self:
    """The delta of a target whose trained leaves all start at zero."""
    draw = lambda _: {n: jnp.zeros(s) for n, s in cls.layer_shapes(target).items()}
    return cls.of_target(cls.drawn(key, target, draw), target, plan)

  @classmethod
  def axis_sizes(
    cls, shape: Shape, roles: Sequence[str], sizes: Mapping[str, Any]
  ) -> Mapping[str, Any]:
    """The sizes of the method's own axes: `sizes`, and what follows from the kernel.

    Raises:
      LoraxError: a size that the kernel does not allow.
    """
    del shape, roles
    return sizes

  @classmethod
  def leaf_shapes(
    cls, shape: Shape, roles: Sequence[str], sizes: Mapping[str, Any]
  ) -> dict[str, Shape]:
    """The shapes of the trained leaves beside a kernel.

    Args:
      shape, roles: the kernel's.
      sizes: of the method's own axes: the rank, and options.

    Raises:
      LoraxError: a size that the kernel does not allow.
    """
    return {n: cls.leaf_shape(n, shape, roles, sizes) for n in cls.trained}

  @classmethod
  def leaf_shape(
    cls, name: str, shape: Shape, roles: Sequence[str], sizes: Mapping[str, Any]
  ) -> Shape:
    """The shape of one leaf; arguments and errors as of `leaf_shapes`."""
    sizes = cls.axis_sizes(shape, roles, sizes)
    axes = resolved(cls.axes[name], cls.named_axes(roles, sizes))
    return shape_of(axes, shape, sizes)

  @classmethod
  def layer_shapes(cls, target: Target) -> dict[str, Shape]:
    """The shapes of the trained leaves of one layer, as `drawn` draws them."""
    pairs = zip(target.shape, target.roles, strict=True)
    shape, roles = zip(*((n, r) for n, r in pairs if r != "stack"), strict=True)
    return cls.leaf_shapes(shape, roles, {"rank": target.rank, **target.options})

  def scales(self) -> jax.Array:
    """The scale at each place of the stack that has a delta, (*stack,)."""
    depth = self.roles.count("stack")
    scale = self.leaves().get("scale", jnp.float32(1))
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
    t = self.leaves()[name] if value is None else value
    return self._placed(t, self.leaf_axes(name), shape, fill)

  def placed(self, value: jax.Array, names: Sequence[str], shape: Shape) -> jax.Array:
    """An array that a method makes of its leaves, in the layout of `Parts`.

    Args:
      value: axes as `names` say; all "in" axes as one, all "out" axes as one. Layers
        that have no delta are not in it, and are zero in the result.
      names: as in `axes`.
      shape: the kernel's.
    """
    kernel, given, sizes = self.kernel_axes(), list(value.shape), []
    for name in names:
      if name in ("in", "out"):
        del given[0]
        sizes += [shape[axis] for axis in kernel[name]]
      else:
        n = len(kernel.get(name, "1"))
        sizes, given = sizes + given[:n], given[n:]
    return self._placed(value.reshape(sizes), resolved(names, kernel), shape)

  def full_parts(self, delta: jax.Array, shape: Shape) -> Parts:
    """The parts of a dense delta, (*stack, in, out), of a kernel of this shape."""
    return full(self.placed(delta, ("stack", "in", "out"), shape))

  def sparse_parts(self, values: jax.Array, places: jax.Array, shape: Shape) -> Parts:
    """The parts of a delta that is zero but at some places, formed.

    Args:
      values: (*stack, n).
      places: int32, (*stack, n), in a layer's kernel as (out, in), flat.
      shape: the kernel's.
    """
    fan_in, fan_out = fans(shape, self.roles)

    def put(values, at):
      return jnp.zeros(fan_out * fan_in).at[at].add(values).reshape(fan_out, fan_in).T

    for _ in range(self.roles.count("stack")):
      put = jax.vmap(put)
    return self.full_parts(put(values, places), shape)

  def matrices(self, w: jax.Array) -> jax.Array:
    """A kernel as (*stack, in, out), float32, the layers that have a delta."""
    return matrices(w, self.roles, self.layers)

  def columns(self, name: str) -> jax.Array:
    """A leaf of a stack, kernel axes and a rank as matrices, (*stack, n, r)."""
    t, depth = self.leaves()[name], self.roles.count("stack")
    return t.reshape((*t.shape[:depth], -1, t.shape[-1]))

  def _placed(
    self, t: jax.Array, axes: LeafAxes, shape: Shape, fill: float = 0.0
  ) -> jax.Array:
    stack = by_role(self.roles)["stack"][:1]
    if self.layers is not None and set(stack) <= set(axes):
      length = shape[stack[0]]
      full = jnp.full((length, *t.shape[1:]), fill, t.dtype)
      t = full.at[jnp.asarray(self.layers)].set(t)
    # The kernel's axes in its order, then the method's own.
    places = [len(shape) if isinstance(axis, str) else axis for axis in axes]
    t = t.transpose(sorted(range(t.ndim), key=places.__getitem__))
    t = jnp.expand_dims(t, [i for i in range(len(shape)) if i not in axes])
    return t if t.ndim > len(shape) else t[..., None]


@dataclass(frozen=True, kw_only=True)
class MethodDelta(KernelDelta):
  """A method's delta with the static fields that each has; its own are the leaves.

  Attributes:
    roles: the role of each kernel axis, in the kernel's order.
    dropout: rate on the input of the delta's part of a product.
    layers: the indices on the leading stack axis that have a delta; None for all.
  """

  roles: tuple[str, ...] = field(metadata={"static": True})
  dropout: float = field(default=0.0, metadata={"static": True})
  layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})


def matrices(
  w: jax.Array, roles: Sequence[str], layers: Sequence[int] | None
) -> jax.Array:
  """A kernel as (*stack, in, out), float32, these layers of it or all."""
  axes = by_role(roles)
  w = w.transpose((*axes["stack"], *axes["in"], *axes["out"])).astype(jnp.float32)
  if layers is not None:
    w = w[jnp.asarray(layers)]
  depth, fan_in = len(axes["stack"]), len(axes["in"])
  sizes = math.prod(w.shape[depth : depth + fan_in]), -1
  return w.reshape((*w.shape[:depth], *sizes))


def _within(leaf: jax.Array, axes: LeafAxes, ranks: jax.Array) -> jax.Array:
  """A leaf of stacked layers, zero beyond the rank of each layer."""
  own = ranks.reshape(-1, *[1] * (leaf.ndim - 1))
  for place, axis in enumerate(axes):
    if axis == "rank":
      along = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, place)
      leaf = jnp.where(along < own, leaf, 0.0)
  return leaf
