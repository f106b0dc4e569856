"""Evaluations of a product with several adapters' factors, and the choice among them.

Gathered: the factors of each example's, or token's, slot are read, written and read
again. Side by side: one product with the factors of all slots, masked; as many reads as
there are slots, and multiply-adds with every slot. Sorted: places sorted by slot, and
ragged products, which read the factors where they are stored; each place is moved, and
meets its own slot's factors alone.

Shapes: P places of all examples, S slots, I inputs, R rank, O outputs.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from lorax_flax import devices, ragged
from lorax_flax.methods.slots import Choice

Form = Literal["gathered", "side by side", "sorted"]

# Number of multiply-adds in the time in which one number is read.
SPEED = {"cpu": 10}
_SPEED = 300  # of any accelerator
# Reads in which one place is sorted there and back, in rows of a factor, by platform;
# elsewhere ragged products are too slow. On a CPU the multiply-adds hide it. A TPU's is
# from the memory traffic of a program for v5e: 160 MiB for 4,096 places, 64 slots of
# rank 16, and 2,048 inputs and outputs in bfloat16.
SORTING = {"cpu": 0, "tpu": 3.5}


def form_of(choice: Choice, places: int, rank: int, sortable: bool) -> Form:
  """The evaluation that takes the least time, in reads of one slot's factors.

  Args:
    places: number of those of one example that the product has.
    rank: of one slot's factors.
    sortable: whether the factors are one pair of matrices for each slot, and ragged
      products can take the place of the product.
  """
  platform, slots = devices.platform(), choice.slots
  speed, total = SPEED.get(platform, _SPEED), choice.examples * places
  times: dict[Form, float] = {
    "gathered": 3 * choice.examples * choice.tokens,
    "side by side": slots + total * slots / speed,
  }
  # Sorting places that are sharded would gather them.
  alone = jax.sharding.get_abstract_mesh().size <= 1
  if sortable and alone and platform in SORTING:
    of_place = 1 / speed + SORTING[platform] / rank
    times["sorted"] = min(slots, total) + total * of_place
  return min(times, key=times.__getitem__)


def sorted_product(
  x: jax.Array, slots: jax.Array, a_SxRxI: jax.Array, b_SxRxO: jax.Array
) -> jax.Array:
  """(x a) b with the factors of each place's slot; zero where it is negative.

  Under `vmap` the places of all examples meet the factors together.

  Args:
    x: (*places, I).
    slots: int32, () or of the shape of the places; NaN follows from one that there is
      not.

  Returns:
    (*places, O) in x's dtype.
  """
  count, x_PxI = len(a_SxRxI), x.reshape(-1, x.shape[-1])

  def product(x_PxI: jax.Array, sizes_S: jax.Array) -> jax.Array:
    z_PxR = ragged.product(x_PxI, a_SxRxI, sizes_S, turned=True)
    return ragged.product(z_PxR, b_SxRxO, sizes_S)

  if slots.ndim == 0:
    sizes_S = len(x_PxI) * jax.nn.one_hot(slots, count, dtype=jnp.int32)
    y_PxO = product(x_PxI, sizes_S)
  else:
    slot_P = slots.reshape(-1)
    # Those without a slot come last, in no group.
    group_P = jnp.where((slot_P >= 0) & (slot_P < count), slot_P, count)
    order_P = jnp.argsort(group_P)
    sizes_S = jnp.bincount(group_P, length=count + 1)[:count].astype(jnp.int32)
    y_PxO = product(x_PxI[order_P], sizes_S)[jnp.argsort(order_P)]
  unknown = jnp.where(slots < count, 0.0, jnp.nan).astype(y_PxO.dtype)
  y = y_PxO.reshape((*x.shape[:-1], -1))
  return y + (unknown[..., None] if unknown.ndim else unknown)
