"""Several adapters of one base side by side: for each example, one of them is chosen.

A slot holds what one adapter makes of a kernel, in the layout of `Parts`, padded with
zeros to a common rank. An empty slot changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import LeafAxes, Shape, by_role, shape_of
from lorax_flax.methods.delta import Delta
from lorax_flax.methods.full import Tuned
from lorax_flax.methods.kernel_delta import Followed, KernelDelta, MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class Choice:
  """The slot of one example, or of each of its tokens.

  Attributes:
    slot: int32, () or (T,) with one for each token; negative for none, and NaN follows
      from one that does not exist.
    slots: number of slots.
    examples: number of examples of the batch, each with a choice of its own.
  """

  slot: jax.Array
  slots: int = field(metadata={"static": True})
  examples: int = field(metadata={"static": True})

  @property
  def by_token(self) -> bool:
    """True where each token has a slot of its own."""
    return self.slot.ndim > 0

  @property
  def tokens(self) -> int:
    """Number of slots that are chosen for an example."""
    return self.slot.size

  def token_axis(self, path: str, sizes: Mapping[int, int]) -> int:
    """The axis of the tokens among these, by their size.

    Raises:
      LoraxError: there is none of that size, or more than one.
    """
    found = [axis for axis, size in sizes.items() if size == self.tokens]
    if len(found) != 1:
      raise LoraxError(
        f"{path!r} meets axes of sizes {[*sizes.values()]}, and one of them must be"
        f" that of the {self.tokens} tokens, of which each has an index: give an index"
        " for each example instead"
      )
    return found[0]

  def of(self, t: jax.Array, axis: int, without: jax.Array | float) -> jax.Array:
    """The chosen one along an axis of the slots; `without` where there is none.

    Where each token has its own, the axis is that of the tokens then.
    """
    index = jnp.maximum(self.slot, 0)
    chosen = jnp.take(t, index, axis=axis, mode="fill", fill_value=jnp.nan)
    held = self._along(self.slot >= 0, axis, chosen.ndim)
    return jnp.where(held, chosen, jnp.asarray(without, t.dtype))

  def each(self, t: jax.Array) -> jax.Array:
    """The slots' (…, slots * n) as they are stored, (slots, n, …)."""
    t = t.reshape((*t.shape[:-1], self.slots, -1))
    return jnp.moveaxis(t, (-2, -1), (0, 1))

  def part(self, t: jax.Array, without: float = 0.0) -> jax.Array:
    """The chosen one's n columns of the slots' (…, slots * n): (…, n), or (…, T, n)."""
    found = self.of(self.each(t), 0, without)
    held = self.slot.ndim  # axes of tokens, then n, then the rest
    return jnp.moveaxis(found, range(held + 1), range(-held - 1, 0))

  def mask(self, t: jax.Array, axis: int = 0) -> jax.Array:
    """The slots' columns, (…, slots * n), zero but for the chosen one's.

    Args:
      axis: that of the tokens, or of size 1, where each has its own.
    """
    columns = jax.lax.broadcasted_iota(
      jnp.int32, (1,) * (t.ndim - 1) + t.shape[-1:], t.ndim - 1
    )
    owner = columns // (t.shape[-1] // self.slots)
    slot = self._along(self.slot, axis, t.ndim)
    other = jnp.where(slot < self.slots, 0.0, jnp.nan).astype(t.dtype)
    return jnp.where(owner == slot, t, other)

  def of_places(self, shape: Sequence[int], axis: int) -> jax.Array:
    """The slot of each place, of this shape; on this axis are the tokens."""
    return jnp.broadcast_to(self._along(self.slot, axis, len(shape)), shape)

  def _along(self, x: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Values of tokens on this axis, of these many; an example's one as it is."""
    if not self.by_token:
      return x
    return jnp.expand_dims(x, [i for i in range(ndim) if i != axis % ndim])


@node
@dataclass(frozen=True)
class Slots(MethodDelta):
  """The slots of a kernel.

  Attributes:
    a: (*stack, slots, rank, *in), and b: (*stack, slots, rank, *out), the scale folded
      into b. A slot's factors are one piece of memory, which a product reads in place.
    out_scale, bias: (*stack, slots, *out); None where no adapter may have one.
    choice: the example's slot, while a function is evaluated.
  """

  a: jax.Array
  b: jax.Array
  out_scale: jax.Array | None = None
  bias: jax.Array | None = None
  choice: Choice | None = None

  axes: ClassVar = {
    "a": ("stack", "slots", "rank", "in"),
    "b": ("stack", "slots", "rank", "out"),
    "out_scale": ("stack", "slots", "out"),
    "bias": ("stack", "slots", "out"),
  }
  trained = ()

  @classmethod
  def empty(
    cls, path: str, kernel: Any, deltas: list[Any], slots: int, rank: int, dtype: Any
  ) -> Self:
    """Slots in which any of these deltas fits."""
    found = [_parts(path, delta, kernel, rank) for delta in deltas]
    roles = deltas[0].roles
    for delta in deltas[1:]:
      if delta.roles != roles or delta.dropout != deltas[0].dropout:
        raise LoraxError(
          f"{path!r} has the roles {roles} and dropout {deltas[0].dropout} in one "
          f"adapter, {delta.roles} and {delta.dropout} in another"
        )
    leaves: dict[str, Any] = {}
    for name in cls.axes:
      if any(getattr(parts, name) is not None for parts in found):
        shape = cls.leaf_shape(
          name, kernel.shape, roles, {"slots": slots, "rank": rank}
        )
        leaves[name] = jnp.full(shape, _EMPTY[name], dtype)
    return cls(**leaves, roles=roles, dropout=deltas[0].dropout)

  def leaves(self) -> dict[str, Any]:
    """The arrays by name."""
    return {n: x for n in self.axes if (x := getattr(self, n)) is not None}

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel of every slot; last axes are of slots * rank, and of slots."""

    def side_by_side(name):
      t = self.laid_out(name, w.shape)
      return t.reshape((*t.shape[: w.ndim], -1))

    return Parts(**{name: side_by_side(name) for name in self.leaves()})

  def fitted(self, path: str, delta: Delta, kernel: Any) -> Followed:
    """The delta with its leaves on the host, and zeros up to the slots' rank.

    Raises:
      LoraxError: it is not of low rank, of a larger rank, or has what no slot has.
    """
    parts = _parts(path, delta, kernel, self.rank)
    assert isinstance(delta, Followed)  # Otherwise it would have no parts.
    for name, part in parts._asdict().items():
      if part is not None and getattr(self, name) is None:
        raise LoraxError(
          f"the {type(delta).__name__} of {path!r} has the part {name!r}, for which the"
          " slots were not made: give `empty` an adapter of that method too"
        )
    if delta.roles != self.roles:
      raise LoraxError(
        f"the adapter's {path!r} has the roles {delta.roles}, the slots {self.roles}"
      )
    on_host = jax.tree.map(np.asarray, delta)
    if not isinstance(delta, KernelDelta) or not (delta.rank and delta.pads_rank):
      return on_host
    # The parts' rank may be another than the method's own: twice it, or its square.
    padded = (on_host.padded(r) for r in range(self.rank, delta.rank, -1))
    fits = lambda delta: _shapes(delta, kernel).a.shape[-1] <= self.rank
    return next(filter(fits, padded), on_host)

  def written(self, index: jax.Array, delta: Followed, kernel: jax.Array) -> Self:
    """The slots with this delta in one of them."""
    parts, found = delta.parts(kernel), {}
    for name, leaf in self.leaves().items():
      part, axes = getattr(parts, name), self.leaf_axes(name)
      if part is None:
        part = jnp.full((1,) * (kernel.ndim + 1), _EMPTY[name])
      part, place = _carried(part, axes, kernel.shape), axes.index("slots")
      if "rank" in axes:
        more = self.rank - part.shape[-1]
        part = jnp.pad(part, [*((0, 0),) * (part.ndim - 1), (0, more)])
        part = jnp.moveaxis(part, -1, place)  # where it stands once slots are gone
      else:
        part = part[..., 0]
      found[name] = jax.lax.dynamic_update_index_in_dim(
        leaf, part.astype(leaf.dtype), index, place
      )
    return replace(self, **found)

  def cleared(self, index: jax.Array) -> Self:
    """The slots with one that is empty."""
    found = {}
    for name, leaf in self.leaves().items():
      place = self.leaf_axes(name).index("slots")
      none = jnp.full((*leaf.shape[:place], *leaf.shape[place + 1 :]), _EMPTY[name])
      found[name] = jax.lax.dynamic_update_index_in_dim(
        leaf, none.astype(leaf.dtype), index, place
      )
    return replace(self, **found)


_EMPTY = {"a": 0.0, "b": 0.0, "out_scale": 1.0, "bias": 0.0}


@node
@dataclass(frozen=True)
class TunedSlots(Delta):
  """The slots of a leaf that adapters replace: a head, a bias.

  Attributes:
    value: (slots, …), the leaf of each; an empty slot has what it held last, and no
      adapter is in it.
    filled: (slots,) bool.
    choice: as of `Slots`.
  """

  value: jax.Array
  filled: jax.Array
  choice: Choice | None = None

  axes: ClassVar = {"value": ("slots", "kernel"), "filled": ("slots",)}
  trained = ()

  @classmethod
  def empty(cls, leaf: Any, slots: int, dtype: Any) -> Self:
    """Slots of which none holds a leaf."""
    return cls(jnp.zeros((slots, *leaf.shape), dtype), jnp.zeros(slots, bool))

  def kernel_axes(self) -> Mapping[str, tuple[int, ...]]:
    return {"kernel": tuple(range(self.value.ndim - 1))}

  def leaves(self) -> dict[str, Any]:
    """The arrays by name."""
    return {name: getattr(self, name) for name in self.axes}

  def merged(self, w: jax.Array) -> jax.Array:
    """The chosen slot's leaf; the base's where there is none."""
    assert self.choice is not None  # Otherwise there is no one leaf.
    w = w.astype(self.value.dtype)
    held = self.choice.of(self.filled, 0, False)
    return jnp.where(held, self.choice.of(self.value, 0, 0.0), w)

  def fitted(self, path: str, delta: Delta, leaf: Any) -> Delta:
    """The delta with its leaves on the host.

    Raises:
      LoraxError: it does not replace the leaf.
    """
    del leaf
    if not isinstance(delta, Tuned):
      raise LoraxError(
        f"the adapter has a {type(delta).__name__} at {path!r}, where slots were made "
        "for leaves that are trained in full"
      )
    return jax.tree.map(np.asarray, delta)

  def written(self, index: jax.Array, delta: Delta, leaf: jax.Array) -> Self:
    """The slots with this leaf in one of them."""
    value = delta.merged(leaf).astype(self.value.dtype)
    put = jax.lax.dynamic_update_index_in_dim
    return replace(
      self,
      value=put(self.value, value, index, 0),
      filled=put(self.filled, True, index, 0),
    )

  def cleared(self, index: jax.Array) -> Self:
    """The slots with one that is empty."""
    put = jax.lax.dynamic_update_index_in_dim
    return replace(self, filled=put(self.filled, False, index, 0))


def _parts(path: str, delta: Delta, kernel: Any, rank: int) -> Parts:
  """Shapes of the delta's parts, which must be of low rank.

  Raises:
    LoraxError: they are not, or of a larger rank than this.
  """
  name = type(delta).__name__
  if not isinstance(delta, Followed):
    raise LoraxError(
      f"the adapter has a {name} at {path!r}, where slots were made for factors"
    )
  delta.check(path, kernel.shape)
  parts = _shapes(delta, kernel)
  axes = by_role(delta.roles)
  pairs = (parts.a, axes["out"]), (parts.b, axes["in"])
  if any(t.shape[i] != 1 for t, others in pairs for i in others):
    raise LoraxError(
      f"the {name} of {path!r} is not a product of two factors, and can't share a batch"
      " with others: lx.as_lora makes a LoRA of it"
    )
  if parts.a.shape[-1] > rank:
    raise LoraxError(
      f"the {name} of {path!r} has factors of rank {parts.a.shape[-1]}, and max_rank is"
      f" {rank}: raise it, or lx.as_lora makes a LoRA of that rank"
    )
  return parts


@jax.jit  # which is not run: its traces are kept
def _made(delta: Any, kernel: jax.Array) -> Parts:
  return delta.parts(kernel)


def _shapes(delta: Any, kernel: Any) -> Parts:
  """Shapes of the parts of a delta."""
  return _made.eval_shape(delta, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))


def _carried(part: jax.Array, axes: LeafAxes, kernel: Shape) -> jax.Array:
  """A part with the axes that a leaf carries, in the leaf's order, and the last."""
  order = [axis for axis in axes if isinstance(axis, int)]
  gone = [i for i in range(len(kernel)) if i not in order]
  part = part.transpose((*order, *gone, part.ndim - 1))
  part = part.reshape((*part.shape[: len(order)], part.shape[-1]))
  return jnp.broadcast_to(part, (*shape_of(tuple(order), kernel, {}), part.shape[-1]))
