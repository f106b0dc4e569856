"""Many adapters over one base: each example, or token, is computed with its own.

The function runs once for a batch, vmapped over its examples: the base is the same for
all of them, so that each product with a kernel stays one product, and an example's
adapter is chosen where it is used, out of slots that hold them all. Which adapters are
in the slots is data, whatever their ranks, targets and methods.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt.paths import PyTree, arrays, is_array
from lorax_flax.adapt.transform import Adapted
from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.methods import Adapter, Tuned
from lorax_flax.methods.slots import Choice, Slots, TunedSlots
from lorax_flax.quant import dense

# What the adapters make of each leaf of the base, by path.
AllSlots = dict[str, Slots | TunedSlots]


@dataclass(frozen=True)
class Many:
  """A function with an adapter for each example. See `many`."""

  lora: Adapted
  capacity: int
  max_rank: int
  in_axes: Any
  out_axes: Any

  def empty(
    self, params: PyTree, /, *adapters: Adapter, dtype: Any = jnp.float32
  ) -> AllSlots:
    """Slots that hold no adapter.

    Args:
      params: the base.
      adapters: examples of what the slots may hold, arrays or ShapeDtypeStructs: the
        leaves that they change, and the methods by which, are those that any may.
      dtype: of the slots' leaves.

    Raises:
      LoraxError: no path, or one that the base does not have; a method that is not of
        low rank.
    """
    leaves = arrays(params)
    found: AllSlots = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
      _check_path(path, leaves)
      deltas = [adapter[path] for adapter in adapters if path in adapter]
      tuned = [isinstance(delta, Tuned) for delta in deltas]
      leaf, slots = leaves[path], self.capacity
      if all(tuned):
        found[path] = TunedSlots.empty(leaf, slots, dtype)
      else:
        found[path] = Slots.empty(path, leaf, deltas, slots, self.max_rank, dtype)
    if not found:
      raise LoraxError("slots for no leaf: give an adapter that has some")
    return found

  def put(
    self, params: PyTree, slots: AllSlots, index: int, adapter: Adapter | None, /
  ) -> AllSlots:
    """The slots with an adapter in one of them, in place of what it held.

    The slots are given away. Compiled once for each method and shape of kernel,
    whatever the adapter's targets and ranks.

    Args:
      index: number of the slot.
      adapter: None to clear the slot.

    Raises:
      LoraxError: no such slot; an adapter that does not fit the base or the slots, of
        which nothing was then given away.
    """
    if not 0 <= index < self.capacity:
      raise LoraxError(f"slot {index} of {self.capacity} (capacity), numbered from 0")
    leaves, place = arrays(params), np.int32(index)
    fitted = self.fitted(params, slots, adapter or {})
    return {
      path: _written(held, place, fitted[path], leaves[path])
      if path in fitted
      else _cleared(held, place)
      for path, held in slots.items()
    }

  def filled(
    self, params: PyTree, adapters: Sequence[Adapter], /, dtype: Any = jnp.float32
  ) -> AllSlots:
    """Slots with these adapters, from slot 0 on, as a pure function of their leaves.

    Training differentiates it. Compiled for the adapters' ranks, targets and methods.

    Raises:
      LoraxError: more than the capacity; one that does not fit the base.
    """
    if len(adapters) > self.capacity:
      raise LoraxError(f"{len(adapters)} adapters for a capacity of {self.capacity}")
    leaves, slots = arrays(params), self.empty(params, *adapters, dtype=dtype)
    for index, adapter in enumerate(adapters):
      for path, delta in adapter.items():
        place, leaf = jnp.int32(index), dense(leaves[path])
        held: Any = slots[path]  # It was made for such deltas.
        slots[path] = held.written(place, delta, leaf)
    return slots

  def fitted(self, params: PyTree, slots: AllSlots, adapter: Adapter, /) -> Adapter:
    """The adapter as `put` takes it up: on the host, padded to the slots' rank.

    Raises:
      LoraxError: it does not fit the base or the slots.
    """
    leaves = arrays(params)
    found: Adapter = {}
    for path, delta in adapter.items():
      if path not in slots:
        raise LoraxError(unknown("path of the slots", path, slots))
      _check_path(path, leaves)
      found[path] = slots[path].fitted(path, delta, leaves[path])
    return found

  def apply(
    self,
    params: PyTree,
    slots: AllSlots,
    ids: Any,
    /,
    *args,
    lora_dropout_key: jax.Array | None = None,
    **kwargs,
  ) -> Any:
    """fn(params, *args, **kwargs), each example with the adapter of its slot.

    Args:
      ids: int32, the slot of each example, (B,), or of each of its tokens, (B, T); -1
        for the base alone. Each weight that adapters change then meets one axis of T
        places, and none is trained in full.
      args, kwargs: of the function, with axes of examples as `many` was told.
      lora_dropout_key: as of `Adapted.apply`; each example drops by itself.

    Returns:
      what the function returns. A result without an axis of examples (a loss) has one
      for each: it is computed from each example alone.
    """

    def one(adapter, keys, args, kwargs):
      own = None if keys is None else keys[0]
      return self.lora.apply(params, adapter, *args, lora_dropout_key=own, **kwargs)

    keys = None
    if lora_dropout_key is not None:
      keys = jax.random.split(lora_dropout_key, len(ids))
    axes = self.in_axes
    axes = axes if isinstance(axes, tuple) else (axes, axes)
    return each(one, slots, ids, (keys, args, kwargs), (0, *axes), self.out_axes)


def many(
  lora: Adapted,
  *,
  capacity: int,
  max_rank: int,
  in_axes: Any = 0,
  out_axes: Any = 0,
) -> Many:
  """Makes of an adapted function one that has an adapter for each example of a batch.

  Args:
    lora: of a function that computes each example from itself.
    capacity: number of adapters in memory.
    max_rank: the largest rank of one; smaller ones are padded with zeros.
    in_axes: the axis of the examples in the arguments: of all arrays; or a prefix of
      the tree (args, kwargs), with None where all examples share an array. What has no
      axes is shared.
    out_axes: the same of the results.

  >>> import jax, jax.numpy as jnp
  >>> import lorax_flax as lx
  >>> fn = lambda params, x: x @ params["up"]
  >>> params, x = {"up": jnp.ones((3, 8))}, jnp.ones((2, 3))
  >>> lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up"]))
  >>> adapter = lora.init(jax.random.key(0), params, x)
  >>> mixed = lx.many(lora, capacity=4, max_rank=16)
  >>> slots = mixed.put(params, mixed.empty(params, adapter), 3, adapter)
  >>> mixed.apply(params, slots, jnp.array([3, -1]), x).shape
  (2, 8)
  """
  for name, value in (("capacity", capacity), ("max_rank", max_rank)):
    if value < 1:
      raise LoraxError(f"{name} must be at least 1, not {value}")
  return Many(lora, capacity, max_rank, in_axes, out_axes)


def each(
  fn: Callable[..., Any],
  slots: AllSlots,
  ids: Any,
  args: Sequence[Any],
  in_axes: Any = 0,
  out_axes: Any = 0,
) -> Any:
  """fn(adapter, *args) for each example, the adapter being that of its slot.

  Args:
    fn: a function of an adapter and of batches of one example.
    ids: as of `Many.apply`.
    args: batches of examples.
    in_axes, out_axes: as of `many`; `in_axes` is a prefix of `args`.

  Raises:
    LoraxError: a slot that does not exist, where the ids are no tracers; an argument of
      another number of examples, or a result that is not of one.
  """
  num_slots = _capacity(slots)
  ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
  _check_ids(ids, num_slots)
  ids = jnp.asarray(ids, jnp.int32)
  if ids.ndim == 2:
    ids = _by_token(slots, ids)
  examples = len(ids)
  leaves, tree = jax.tree.flatten(tuple(args), is_leaf=_is_none)
  axes = jax.tree.leaves(_broadcast(in_axes, tuple(args)), is_leaf=_is_none)
  moves = [
    axis is not None and is_array(x) and len(x.shape) > 0
    for x, axis in zip(leaves, axes, strict=True)
  ]
  batched, places = [], []
  for x, axis, is_batched in zip(leaves, axes, moves, strict=True):
    if not is_batched:
      continue
    if axis >= len(x.shape) or x.shape[axis] != examples:
      raise LoraxError(
        f"an argument of shape {tuple(x.shape)} has not the {examples} examples of the"
        f" ids on axis {axis}: see in_axes"
      )
    batched.append(jnp.expand_dims(x, axis + 1))
    places.append(axis)

  def one(slot, batched):
    choice, given = Choice(slot, num_slots, examples), iter(batched)
    adapter = {path: replace(held, choice=choice) for path, held in slots.items()}
    inner = [next(given) if m else x for x, m in zip(leaves, moves, strict=True)]
    result = fn(adapter, *jax.tree.unflatten(tree, inner))
    return jax.tree.map(_with_example, result, _broadcast(out_axes, result))

  run = jax.vmap(one, in_axes=(0, places), out_axes=out_axes)
  result = run(ids, batched)
  axes_of_result = _broadcast(out_axes, result)
  return jax.tree.map(lambda y, axis: y.squeeze(axis + 1), result, axes_of_result)


def _with_example(y: Any, axis: int) -> jax.Array:
  """A result of one example, on this axis."""
  y = jnp.asarray(y)
  if y.ndim == axis:
    return jnp.expand_dims(y, axis)
  if y.ndim < axis or y.shape[axis] != 1:
    raise LoraxError(
      f"a result of one example has the shape {y.shape}, and not 1 on axis {axis}: see"
      " out_axes"
    )
  return y


def _capacity(slots: AllSlots) -> int:
  """Number of slots."""
  first = next(iter(slots.values()))
  return first.sizes()["slots"]


def _by_token(slots: AllSlots, ids_BxT: jax.Array) -> jax.Array:
  """The ids of tokens, or where an example has one token, its own."""
  if ids_BxT.shape[1] == 1:
    return ids_BxT[:, 0]
  if full := [path for path, held in slots.items() if isinstance(held, TunedSlots)]:
    raise LoraxError(
      f"adapters train {listing(full)} in full, and tokens can't each have their own:"
      " give an index for each example"
    )
  return ids_BxT


def _check_ids(ids: Any, slots: int) -> None:
  if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise LoraxError(
      f"ids of shape {ids.shape} and {ids.dtype}: one integer an example, or a token"
    )
  if isinstance(ids, jax.core.Tracer):
    return
  ids = np.asarray(ids)
  if ids.size and not (ids.min() >= -1 and ids.max() < slots):
    raise LoraxError(
      f"ids from {ids.min()} to {ids.max()}: the slots are 0 to {slots - 1}, and -1"
      " means the base"
    )


def _check_path(path: str, leaves: Mapping[str, Any]) -> None:
  if path not in leaves:
    raise LoraxError(unknown("adapter path", path, leaves))


def _is_none(x: Any) -> bool:
  return x is None


def _broadcast(axes: Any, tree: PyTree) -> PyTree:
  """The axis of each leaf of a tree, by a prefix of it."""
  try:
    return jax.tree.broadcast(axes, tree, is_leaf=_is_none)
  except ValueError as error:
    raise LoraxError(f"axes that are no prefix of the tree: {error}") from error


@partial(jax.jit, donate_argnums=0)
def _written(held: Any, index: jax.Array, delta: Any, leaf: Any) -> Any:
  return held.written(index, delta, dense(leaf))


@partial(jax.jit, donate_argnums=0)
def _cleared(held: Any, index: jax.Array) -> Any:
  return held.cleared(index)
