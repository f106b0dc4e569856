"""Evaluations of a product with several adapters' factors, and the choice among them.

Gathered: the factors of each example's, or token's, slot are read, written and read
again. Side by side: one product with the factors of all slots, masked; as many reads as
there are slots, and multiply-adds with every slot. Sorted: places sorted by slot, and a
ragged product; each place is moved, and meets its own slot's factors alone.

Shapes: P places of all examples, S slots, I inputs, R rank, O outputs.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lorax_flax import devices, ragged
from lorax_flax.methods.slots import Choice

Form = Literal["gathered", "side by side", "sorted"]

# Number of multiply-adds in the time in which one number is read.
SPEED = {"cpu": 10}
_SPEED = 300  # of any accelerator
# Platforms on which ragged products are a kernel, or were measured to be fast.
RAGGED = {"cpu", "tpu"}
# Rows of a ragged product's block, of which each slot's last one is not full.
BLOCK = 256
# Reads in which one place is sorted there and back, in rows of a factor; counted in the
# program that is compiled for a v5e (benchmarks/RESULTS.md), and no less on a CPU.
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
    rows = total + slots * min(BLOCK, total)
    times["sorted"] = slots + rows / speed + total * SORTING / rank
  return min(times, key=times.__getitem__)


def sorted_product(
  x: jax.Array, slots: jax.Array, a_SxIxR: jax.Array, b_SxRxO: jax.Array, dtype: Any
) -> jax.Array:
  """(x a) b with the factors of each place's slot; zero where it is negative.

  Under `vmap` the places of all examples are sorted together.

  Args:
    x: (*places, I).
    slots: int32 of the shape of the places; NaN follows from one that there is not.

  Returns:
    (*places, O) of this dtype.
  """
  own_P = slots.reshape(-1)
  z_PxR = ragged.product_of(x.reshape(-1, x.shape[-1]), a_SxIxR, own_P)
  y_PxO = ragged.product_of(z_PxR, b_SxRxO, own_P).astype(dtype)
  y_PxO = jnp.where((own_P < len(a_SxIxR))[:, None], y_PxO, jnp.nan)
  return y_PxO.reshape((*slots.shape, -1))
