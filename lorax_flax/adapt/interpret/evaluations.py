"""Evaluations of a product with several adapters' factors, and the choice among them.

Gathered: the factors of each example's, or token's, slot are read, written and read
again. Side by side: one product with the factors of all slots, masked; as many reads as
there are slots, and multiply-adds with every slot. Sorted: places sorted by slot, and a
ragged product; each place is moved, and meets its own slot's factors alone.

Shapes: P places of all examples, S slots, I inputs, R rank, O outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from lorax_flax import devices
from lorax_flax.methods.slots import Choice

Form = Literal["gathered", "side by side", "sorted"]

# Number of multiply-adds in the time in which one number is read.
SPEED = {"cpu": 10}
_SPEED = 300  # of any accelerator
# Platforms whose compiler meets each group's own rows alone in a ragged product. CPUs
# multiply the rows by all groups' factors, and copy them for each group.
RAGGED = {"tpu"}
# Reads in which one place is sorted there and back, in rows of a factor; counted in the
# program that is compiled for a v5e (benchmarks/RESULTS.md).
SORTING = 15


def form_of(choice: Choice, places: int, rank: int, sortable: bool) -> Form:
  """The evaluation that takes the least time, in reads of one slot's factors.

  Args:
    places: number of those of one example that the product has.
    rank: of one slot's factors.
    sortable: whether the factors are one pair of matrices for each slot.
  """
  platform, slots = devices.platform(), choice.slots
  speed, total = SPEED.get(platform, _SPEED), choice.examples * places
  times: dict[Form, float] = {
    "gathered": 3 * choice.examples * choice.tokens,
    "side by side": slots + total * slots / speed,
  }
  # Sorting places that are sharded would gather them.
  alone = jax.sharding.get_abstract_mesh().size <= 1
  if sortable and alone and platform in RAGGED:
    times["sorted"] = slots + total * (1 / speed + SORTING / rank)
  return min(times, key=times.__getitem__)


def sorted_product(
  x: jax.Array,
  slots: jax.Array,
  a_SxIxR: jax.Array,
  b_SxRxO: jax.Array,
  *,
  precision: Any,
  dtype: Any,
) -> jax.Array:
  """(x a) b with the factors of each place's slot; zero where it is negative.

  Under `vmap` the places of all examples are sorted together.

  Args:
    x: (*places, I).
    slots: int32 of the shape of the places; NaN follows from one that there is not.

  Returns:
    (*places, O) of this dtype.
  """
  run = _by_slot(precision, jnp.dtype(dtype))
  x_PxI = x.reshape(-1, x.shape[-1])
  y_PxO = run(x_PxI, slots.reshape(-1), a_SxIxR, b_SxRxO)
  return y_PxO.reshape((*x.shape[:-1], -1))


@functools.cache
def _by_slot(precision: Any, dtype: Any) -> Callable[..., jax.Array]:
  """The product of places and the factors of their slots, for any `vmap` and gradient.

  Both directions are flattened over examples, and so each is a function of its own.
  """

  def product(places, factors):
    (x_PxI, slot_P), (a_SxIxR, b_SxRxO) = places, factors
    slots = len(a_SxIxR)
    # Those without a slot come last, in no group.
    group_P = jnp.where((slot_P >= 0) & (slot_P < slots), slot_P, slots)
    order_P = jnp.argsort(group_P)
    sizes_S = jnp.bincount(group_P, length=slots + 1)[:slots].astype(jnp.int32)
    ragged = functools.partial(
      jax.lax.ragged_dot, group_sizes=sizes_S, precision=precision
    )
    z_PxR = ragged(x_PxI[order_P], a_SxIxR)
    y_PxO = ragged(z_PxR, b_SxRxO, preferred_element_type=dtype)
    y_PxO = y_PxO[jnp.argsort(order_P)]
    without_P = jnp.where(slot_P < 0, 0.0, jnp.nan).astype(dtype)
    return (jnp.where(group_P[:, None] < slots, y_PxO, without_P[:, None]),), ()

  def gradients(places, factors):
    x_PxI, slot_P, dy_PxO = places
    run = lambda x_PxI, *factors: product((x_PxI, slot_P), factors)[0][0]
    dx_PxI, *rest = jax.vjp(run, x_PxI, *factors)[1](dy_PxO)
    return (dx_PxI,), tuple(rest)

  forward, backward = _flattened(product), _flattened(gradients)

  @jax.custom_vjp
  def by_slot(x_PxI, slot_P, a_SxIxR, b_SxRxO):
    ((y_PxO,), _) = forward((x_PxI, slot_P), (a_SxIxR, b_SxRxO))
    return y_PxO

  def back(saved, dy_PxO):
    x_PxI, slot_P, *factors = saved
    ((dx_PxI,), rest) = backward((x_PxI, slot_P, dy_PxO), tuple(factors))
    return dx_PxI, None, *rest

  by_slot.defvjp(lambda *args: (by_slot(*args), args), back)
  return by_slot


def _flattened(fn: Callable[..., Any]) -> Callable[..., Any]:
  """(places, factors) -> (results of places, sums over places), under `vmap` run once.

  Its examples' places are one after another then, where they share their factors.
  """
  run = custom_vmap(fn)

  @run.def_vmap
  def _all(size, batched, places, factors):
    full = lambda t, has_axis: t if has_axis else jnp.broadcast_to(t, (size, *t.shape))
    places = tuple(map(full, places, batched[0]))
    if any(batched[1]):
      factors = tuple(map(full, factors, batched[1]))
      results = jax.lax.map(lambda own: run(*own), (places, factors))
      return results, jax.tree.map(lambda _: True, results)
    rows, sums = run(tuple(t.reshape(-1, *t.shape[2:]) for t in places), factors)
    rows = tuple(t.reshape(size, -1, *t.shape[1:]) for t in rows)
    return (rows, sums), ((True,) * len(rows), (False,) * len(sums))

  return run
